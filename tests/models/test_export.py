"""Exported files compute what the model computes, at any batch size."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import SmallCnn, check_onnx, convert_sync_batchnorm, export_model, load_model

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


def image_models() -> dict[str, torch.nn.Module]:
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return {
        "small_cnn": load_model("small_cnn", normalize="imagenet"),
        "synchronised": convert_sync_batchnorm(SmallCnn()),
        "resnet20": load_model("resnet20", normalize="imagenet"),
        "small_vit": load_model("small_vit", image_size=16),
        "transformers resnet": load_model("hf-config:resnet", config=resnet),
        "transformers vit": load_model("hf-config:vit", config={**TINY, "patch_size": 4}, image_size=16),
    }


@needs_onnx
@pytest.mark.parametrize("name", list(image_models()))
def test_every_format_agrees_with_the_model_at_another_batch_size(name, tmp_path):
    model = image_models()[name].train()
    paths = export_model(model, tmp_path, torch.rand(1, 3, 16, 16))
    assert set(paths) == {"safetensors", "torch_export", "onnx"}
    assert model.training
    image = torch.rand(5, 3, 16, 16)
    expected = model.eval()(image)
    assert check_onnx(paths["onnx"], model, image) <= 1e-4
    program = torch.export.load(paths["torch_export"]).module()
    torch.testing.assert_close(program(image), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_model(tmp_path).eval()(image), expected)


@needs_onnx
def test_a_text_model_takes_other_batches_and_lengths(tmp_path):
    model = load_model("hf-config:bert", config={**TINY, "vocab_size": 50}, num_classes=3)

    def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, -2:] = 0
        return {"input_ids": torch.randint(0, 50, (rows, length)), "attention_mask": mask}

    paths = export_model(model, tmp_path, tokens(2, 8))
    other = tokens(5, 11)
    assert check_onnx(paths["onnx"], model, other) <= 1e-4
    program = torch.export.load(paths["torch_export"]).module()
    torch.testing.assert_close(program(other), model.eval()(other), rtol=1e-4, atol=1e-4)


@needs_onnx
def test_onnx_of_other_weights_is_caught(tmp_path):
    model = SmallCnn()
    paths = export_model(model, tmp_path, torch.rand(1, 3, 8, 8), formats=["onnx"])
    assert set(p.name for p in tmp_path.iterdir()) == {"model.onnx"}
    with torch.no_grad():
        model.head.bias += 0.5
    with pytest.raises(UserError, match="differs from the PyTorch one by 0.5"):
        check_onnx(paths["onnx"], model, torch.rand(2, 3, 8, 8))


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript: pip install limbeck\[export\]"):
        export_model(SmallCnn(), tmp_path, torch.rand(1, 3, 8, 8))


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="no export format 'tflite'"):
        export_model(SmallCnn(), tmp_path, torch.rand(1, 3, 8, 8), formats=["tflite"])


class _Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if bool((image.sum() * self.scale) > 0) else -image


def test_a_network_whose_path_depends_on_its_input_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"_Undecided cannot be written as one graph .*--formats safetensors"):
        export_model(_Undecided(), tmp_path, torch.rand(2, 1, 4, 4), formats=("torch_export",))
