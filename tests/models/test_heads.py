"""split_head finds and takes off the final classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import NETS, Normalized, class_count, load_model, split_head

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def models() -> dict[str, tuple[nn.Module, object, int]]:
    image = torch.rand(3, 3, 16, 16)
    tokens = {"input_ids": torch.randint(0, 50, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    text = {**TINY, "vocab_size": 50}
    vit = {**TINY, "patch_size": 4}
    return {
        "resnet20": (NETS["resnet20"](7), image, 64),
        "small_cnn": (NETS["small_cnn"](7), image, 128),
        "small_vit": (NETS["small_vit"](7, image_size=16), image, 96),
        "mlp": (NETS["mlp"](7, image_size=16), image, 256),
        "normalised": (Normalized(NETS["small_cnn"](7), [0.5] * 3, [0.5] * 3), image, 128),
        "transformers resnet": (load_model("hf-config:resnet", config=RESNET, num_classes=7), image, 16),
        "transformers vit": (load_model("hf-config:vit", config=vit, num_classes=7, image_size=16), image, 16),
        "transformers bert": (load_model("hf-config:bert", config=text, num_classes=7), tokens, 16),
        "transformers roberta": (load_model("hf-config:roberta", config=text, num_classes=7), tokens, 16),
        "sequential": (nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.ReLU(), nn.Linear(9, 7)), image, 9),
        "normalised linear probe": (
            Normalized(nn.Sequential(nn.Flatten(), nn.Linear(768, 7)), [0.5] * 3, [0.5] * 3),
            image,
            768,
        ),
    }


@pytest.mark.parametrize("name", list(models()))
def test_head_of_backbone_equals_the_whole_model(name):
    model, x, width = models()[name]
    model.eval()
    expected = copy.deepcopy(model)(x)
    assert class_count(model) == 7
    backbone, head = split_head(model)
    feature = backbone(x)
    assert feature.shape == (3, width)
    torch.testing.assert_close(head(feature), expected)


def test_a_bare_linear_is_all_head():
    linear = nn.Linear(4, 2)
    backbone, head = split_head(linear)
    x = torch.randn(3, 4)
    assert head is linear
    torch.testing.assert_close(backbone(x), x)


def test_the_head_is_where_timm_says():
    class TimmLike(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.auxiliary = nn.Linear(4, 3)

        def get_classifier(self):
            return self.fc

        def forward(self, x):
            return self.fc(x)

    model = TimmLike()
    fc = model.fc
    assert split_head(model)[1] is fc


def test_a_model_without_a_linear_head_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten())
    with pytest.raises(UserError, match="no linear classifier"):
        split_head(model)
    assert class_count(model) is None
