"""Networks on a batch of several modalities: what is missing contributes nothing, and what is saved loads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models import Taps, class_count, save_model
from limbeck.models.audio import SpectrogramLogits
from limbeck.models.multimodal import (
    ConcatFusion,
    GatedFusion,
    MultimodalClassifier,
    OneModality,
    SumFusion,
    load_multimodal_model,
)

SHAPES = {"image": (1, 8, 8), "spectrogram": (1, 16, 10)}
FUSED = {m: {"name": "small_cnn", "config": {"channels": [6, 8]}} for m in SHAPES}


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.rand(4, *shape, generator=generator) for m, shape in SHAPES.items()}


def fused(**more) -> MultimodalClassifier:
    torch.manual_seed(0)
    return load_multimodal_model(encoders=FUSED, num_classes=5, shapes=SHAPES, hidden=12, **more).eval()


@pytest.mark.parametrize("fusion", ["concat", "sum", "gated"])
def test_logits_do_not_depend_on_a_missing_modality(fusion):
    net, fields = fused(fusion=fusion, width=10), batch()
    missing = {**fields, "present_image": torch.tensor([True, False, True, False])}
    spoilt = {**missing, "image": missing["image"].clone()}
    spoilt["image"][1], spoilt["image"][3] = torch.nan, 7.0
    assert torch.equal(net(missing), net(spoilt))
    assert torch.equal(net(missing)[::2], net(fields)[::2])
    assert (net(missing)[1::2] - net(fields)[1::2]).abs().max() > 1e-4
    assert torch.equal(net({**fields, "present_image": torch.ones(4, dtype=torch.bool)}), net(fields))


def test_fusions_compute_their_formulas():
    torch.manual_seed(0)
    features = [torch.randn(3, 2), torch.randn(3, 4)]
    present = [None, torch.tensor([True, True, False])]
    concat = ConcatFusion([2, 4])(features, present)
    assert torch.equal(concat[:2], torch.cat(features, 1)[:2]) and torch.equal(concat[2, 2:], torch.zeros(4))
    total = SumFusion([2, 4], 5)
    parts = [project(f) for project, f in zip(total.project, features, strict=True)]
    torch.testing.assert_close(total(features, present)[0], (parts[0] + parts[1])[0])
    torch.testing.assert_close(total(features, present)[2], parts[0][2])
    gated = GatedFusion([2, 4], 5)
    parts = [torch.tanh(project(f)) for project, f in zip(gated.project, features, strict=True)]
    gate = gated.gate(torch.cat(features, 1)).softmax(1)
    torch.testing.assert_close(gated(features, present)[0], gate[0, 0] * parts[0][0] + gate[0, 1] * parts[1][0])
    torch.testing.assert_close(gated(features, present)[2], parts[0][2])
    nobody = [torch.zeros(3, dtype=torch.bool)] * 2
    assert torch.equal(gated(features, nobody), torch.zeros(3, 5))


def test_inner_layers_can_be_tapped_by_name():
    outputs = Taps(fused(), ["encoders.image", "fusion", "hidden"])(batch())
    assert [tuple(f.shape) for f in outputs.features.values()] == [(4, 8), (4, 16), (4, 12)]
    assert class_count(fused()) == 5


def test_a_network_of_one_modality_reads_its_field_or_a_tensor():
    net = load_multimodal_model("small_cnn", num_classes=5, shapes=SHAPES, target="spectrogram").eval()
    assert net.modalities == ("spectrogram",)
    assert torch.equal(net(batch()), net(batch()["spectrogram"]))
    with pytest.raises(UserError, match="no modality 'spectrogram'.* only image"):
        net({"image": batch()["image"]})


def test_a_modality_that_the_data_lack_is_refused():
    for arguments in ({"modality": "thermal"}, {"encoders": {"thermal": "small_cnn"}}):
        with pytest.raises(UserError, match="no modality 'thermal'.*image, spectrogram"):
            load_multimodal_model(num_classes=5, shapes=SHAPES, **arguments)
    with pytest.raises(UserError, match="must say which"):
        load_multimodal_model("small_cnn", num_classes=5)
    with pytest.raises(UserError, match="fusion is"):
        fused(fusion="late")


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_a_saved_network_loads_with_the_same_logits(tmp_path, fusion):
    net = fused(fusion=fusion)
    again = load_multimodal_model(save_model(net, tmp_path)).eval()
    assert torch.equal(again(batch()), net(batch()))


def test_a_saved_network_of_one_modality_loads(tmp_path):
    net = load_multimodal_model("small_cnn", modality="image", num_classes=5, shapes=SHAPES).eval()
    again = load_multimodal_model(save_model(net, tmp_path), modality="image").eval()
    assert isinstance(again, OneModality) and torch.equal(again(batch()), net(batch()))


TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_spectrogram_transformer_of_transformers_is_an_encoder_like_any_other():
    ast = {"name": "hf-config:audio-spectrogram-transformer", "config": {**TINY, "patch_size": 4}}
    vit = {"name": "hf-config:vit", "config": {**TINY, "patch_size": 4}}
    one = load_multimodal_model(**ast, modality="spectrogram", num_classes=5, shapes=SHAPES)
    assert isinstance(one.model, SpectrogramLogits) and one(batch()).shape == (4, 5)
    both = load_multimodal_model(encoders={"image": vit, "spectrogram": ast}, num_classes=5, shapes=SHAPES, hidden=None)
    assert both(batch()).shape == (4, 5) and both.head.in_features == 24


def test_weights_of_a_sound_encoder_that_are_not_there_are_refused(tmp_path):
    spec = {"name": "hf-config:audio-spectrogram-transformer", "weights": str(tmp_path / "none.safetensors")}
    with pytest.raises(UserError, match="none.safetensors"):
        load_multimodal_model(
            "multimodal", encoders={"spectrogram": spec}, shapes={"spectrogram": [1, 64, 40]}, num_classes=3
        )
