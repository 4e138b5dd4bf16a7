"""Several modalities at training time: cross-modal and multimodal teachers."""
