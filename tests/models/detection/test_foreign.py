"""transformers' detectors behind our protocol, from small configurations."""

from __future__ import annotations

import pytest
import torch

from limbeck.errors import UserError
from limbeck.models import save_model
from limbeck.models.detection import Detector, Targets, load_detector
from limbeck.models.detection.foreign import TorchvisionDetector, _class_scores

YOLOS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": [32, 48],
    "num_detection_tokens": 6,
}
DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_queries": 6,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "backbone_config": {
        "model_type": "resnet",
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "embedding_size": 8,
        "layer_type": "basic",
        "out_features": ["stage2"],
    },
}
TARGETS = Targets(torch.tensor([[[5.0, 5, 30, 20]], [[0.0, 0, 0, 0]]]), torch.tensor([[1], [-1]]))


@pytest.mark.parametrize(("kind", "config"), [("yolos", YOLOS), ("detr", DETR)])
def test_it_answers_the_protocol_with_empty_pictures_too(kind, config):
    torch.manual_seed(0)
    model = load_detector(f"hf-config:{kind}", num_classes=3, config=config).eval()
    assert isinstance(model, Detector) and model.num_classes == 3
    losses = model.losses(torch.rand(2, 3, 32, 48), TARGETS)
    sum(losses.values()).backward()
    assert losses["set_loss"].isfinite() and any(p.grad is not None and p.grad.any() for p in model.parameters())
    found = model(torch.rand(2, 3, 32, 48))
    real = found.labels >= 0
    assert found.boxes.shape == (2, 18, 4) and real.any()
    assert (found.boxes[..., 2] <= 48).all() and (found.boxes[..., 3] <= 32).all() and (found.boxes >= 0).all()
    assert (found.scores[real] > 0.05).all()


def test_a_saved_one_comes_back_with_its_weights(tmp_path):
    model = load_detector("hf-config:yolos", num_classes=3, config=YOLOS).eval()
    save_model(model, tmp_path)
    again = load_detector(tmp_path).eval()
    picture = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(again(picture).scores, model(picture).scores)
    with pytest.raises(UserError, match="has 3 classes"):
        load_detector(tmp_path, num_classes=4)


def test_a_class_for_no_object_is_no_class_and_without_it_scores_are_independent():
    logits = torch.tensor([[[1.0, 2.0, 3.0]]])
    torch.testing.assert_close(_class_scores(logits, 2), logits.softmax(-1)[..., :2])
    torch.testing.assert_close(_class_scores(logits, 3), logits.sigmoid())


def test_an_unknown_key_or_type_is_one_sentence():
    with pytest.raises(UserError, match="num_querries"):
        load_detector("hf-config:detr", num_classes=3, config={"num_querries": 3})
    with pytest.raises(UserError, match="no model type 'detrr'"):
        load_detector("hf-config:detrr", num_classes=3)


class Torchvisions(torch.nn.Module):
    """The calling convention of torchvision's detectors, in two lines of network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, images, targets=None):
        if self.training:
            assert all(target["labels"].min() >= 1 for target in targets if len(target["labels"]))
            return {"loss": self.weight * sum(len(target["boxes"]) for target in targets)}
        box = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
        return [{"boxes": box, "scores": torch.tensor([0.9, 0.4]), "labels": torch.tensor([3, 1])} for _ in images]


def test_torchvisions_convention_becomes_ours_and_the_mode_is_given_back():
    model = TorchvisionDetector(Torchvisions(), 3, most=3).eval()
    found = model(torch.rand(2, 3, 8, 8))
    assert found.labels.tolist() == [[2, 0, -1]] * 2 and found.scores[0].tolist() == pytest.approx([0.9, 0.4, 0])
    assert found.boxes[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert model.losses(torch.rand(2, 3, 8, 8), TARGETS)["loss"] == 0.5
    assert not model.model.training


@pytest.mark.slow
def test_detr_with_resnet_50_makes_a_training_step_at_real_size():
    model = load_detector("hf-config:detr", num_classes=20)
    assert sum(p.numel() for p in model.parameters()) > 40e6
    loss = model.losses(torch.rand(1, 3, 256, 320), Targets(torch.tensor([[[5.0, 5, 90, 80]]]), torch.tensor([[1]])))
    loss["set_loss"].backward()
    assert loss["set_loss"].isfinite()
