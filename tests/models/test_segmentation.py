"""Segmenters: a score for each class at each pixel of the input, by whichever network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import (
    MiniDeepLab,
    Normalized,
    Taps,
    load_segmenter,
    require_classes,
    save_model,
    with_batch_statistics,
)

SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
}
SMALL = {"channels": [4, 6, 8]}


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (64, 64)])
@pytest.mark.parametrize(("name", "config"), [("mini_deeplab", SMALL), ("hf-config:segformer", SEGFORMER)])
def test_logits_have_the_size_of_the_picture(name, config, size):
    model = load_segmenter(name, num_classes=5, config=config).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_taps_see_the_named_layers():
    model = load_segmenter("mini_deeplab", num_classes=5, in_channels=1, config=SMALL).eval()
    picture = torch.rand(2, 1, 32, 48)
    outputs = Taps(model, ["encoder.0", "head", "classifier"])(picture)
    assert outputs.features["encoder.0"].shape == (2, 4, 16, 24)
    assert outputs.features["head"].shape == (2, 8, 8, 12) and outputs.features["classifier"].shape == (2, 5, 8, 12)
    torch.testing.assert_close(outputs.logits, model(picture))


def test_a_pixel_sees_beyond_its_neighbours():
    model = MiniDeepLab(2, channels=(4, 4, 4, 4)).eval()
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    model(picture)[0, 0, 32, 32].backward()
    assert (picture.grad[0].abs().sum(0) > 0).float().mean() > 0.3


def test_a_batch_of_one_trains():
    MiniDeepLab(2).train()(torch.rand(1, 3, 16, 16)).sum().backward()


@pytest.mark.parametrize(("name", "config"), [("mini_deeplab", SMALL), ("hf-config:segformer", SEGFORMER)])
@pytest.mark.parametrize("normalize", ["imagenet", None])
def test_a_saved_segmenter_is_loaded_as_it_was(tmp_path, name, config, normalize):
    model = load_segmenter(name, num_classes=5, config=config, normalize=normalize).eval()
    again = load_segmenter(save_model(model, tmp_path)).eval()
    picture = torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(again(picture), model(picture))
    assert isinstance(again, Normalized) == (normalize is not None)


def test_a_checkpoint_gives_its_weights_and_no_head_of_chance(tmp_path):
    model = load_segmenter("hf-config:segformer", num_classes=5, config=SEGFORMER).eval()
    save_model(model, tmp_path)
    (tmp_path / "limbeck.json").unlink()
    again = load_segmenter(f"hf:{tmp_path}").eval()
    picture = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(again(picture), model(picture))
    with pytest.raises(UserError, match="5 classes, 7 were asked for"):
        load_segmenter(f"hf:{tmp_path}", num_classes=7)
    assert load_segmenter(f"hf:{tmp_path}", num_classes=7, new_head=True)(picture).shape[1] == 7


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mini_deplab", {}, "did you mean 'mini_deeplab'"),
        ("mini_deeplab", {"config": {"chanels": [8]}}, "no argument 'chanels'"),
        ("mini_deeplab", {"config": {"channels": [8, 8]}}, "at least 3 widths"),
        ("hf-config:segformer", {"config": {"depth": [1]}}, "has no 'depth'"),
        ("hf-config:bert", {}, "no semantic segmenter of type 'bert'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(name, settings, said):
    with pytest.raises(UserError, match=said):
        load_segmenter(name, num_classes=3, **settings)


def test_other_class_counts_than_the_masks_are_refused():
    for name, config in (("mini_deeplab", SMALL), ("hf-config:segformer", SEGFORMER)):
        model = load_segmenter(name, num_classes=5, config=config, normalize="imagenet")
        require_classes(model, 5)
        with pytest.raises(UserError, match="has 5 classes and the masks 4"):
            require_classes(model, 4)
    require_classes(nn.Conv2d(3, 9, 1), 4)  # a network that states none is believed


def test_batch_statistics_without_dropout():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9))
    with_batch_statistics(net.train())
    picture = torch.rand(4, 3, 8, 8) + 5
    torch.testing.assert_close(net(picture).mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert not net[1].training and net[0].num_batches_tracked == 1
