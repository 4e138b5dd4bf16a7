"""Files to deploy: safetensors, a torch.export program, ONNX.

Shapes: B samples (any number in every exported form), C classes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.cost import Input, take_rows
from limbeck.models.load import save_model

FORMATS = ("safetensors", "torch_export", "onnx")


def export_model(
    model: nn.Module, folder: str | Path, example: Input, formats: Sequence[str] = FORMATS
) -> dict[str, Path]:
    """Writes `model` in each of `formats` to `folder`; returns the paths by format.

    `safetensors`: `model.safetensors` and its description (`load_model(folder)` reads them). `torch_export`:
    `model.pt2` (`torch.export.load(path).module()`). `onnx`: `model.onnx`. `example` is an input like those to
    come: pictures [B, channels, H, W] in [0, 1], or a token dict of [B, tokens] tensors; the batch may be of any
    size in what is written, and so may the number of tokens. The model is exported in eval mode, normalisation
    included, and left in the mode in which it came.

    Raises `UserError` for an unknown format, when the ONNX packages are missing, and for a network that is no graph.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise UserError(f"There is no export format '{unknown[0]}'; choose from {', '.join(FORMATS)}.")
    if "onnx" in formats:
        _need("onnx", "onnxscript")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    if "safetensors" in formats:
        paths["safetensors"] = save_model(model, folder) / "model.safetensors"
    if "torch_export" in formats or "onnx" in formats:
        program = _program(model, example)
    if "torch_export" in formats:
        paths["torch_export"] = folder / "model.pt2"
        torch.export.save(program, paths["torch_export"])
    if "onnx" in formats:
        paths["onnx"] = folder / "model.onnx"
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None
        exported.save(paths["onnx"], external_data=False)
    return paths


def check_onnx(path: str | Path, model: nn.Module, example: Input, tolerance: float = 1e-4) -> float:
    """Largest absolute difference of logits between onnxruntime on `path` and `model` on `example`, in eval mode.

    Raises `UserError` when it exceeds `tolerance`, or when onnxruntime is missing.
    """
    _need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # The graph's inputs are the leaves of the example, in the order in which torch flattens it.
    leaves, _ = torch.utils._pytree.tree_flatten(example)
    feed = {i.name: leaf.cpu().numpy() for i, leaf in zip(session.get_inputs(), leaves, strict=True)}
    (logits,) = session.run(None, feed)
    training = model.training
    with torch.inference_mode():
        expected_BC = model.eval()(example)
    model.train(training)
    difference = float((torch.from_numpy(logits) - expected_BC.cpu()).abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"The ONNX model in '{path}' differs from the PyTorch one by {difference:.2g} (at most {tolerance:.0e} "
            "expected); export it again from the same weights."
        )
    return difference


def _program(model: nn.Module, example: Input) -> torch.export.ExportedProgram:
    # One row would be taken for a constant batch of 1.
    rows = take_rows(example, 2)
    training = model.training
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), (rows,), dynamic_shapes=(_dynamic(rows),))
    except Exception as error:  # tracing fails in as many ways as networks are written
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{type(model).__name__} cannot be written as one graph ({reason}); a network whose path depends on what "
            "it sees, such as a detector's suppression of boxes, is written by formats=('safetensors',) only "
            "(--formats safetensors)."
        ) from error
    finally:
        model.train(training)


def _dynamic(example: Input) -> Any:
    """The batch may vary; of token dicts the number of tokens too, where the model lets it."""
    if isinstance(example, Tensor):
        return {0: torch.export.Dim.DYNAMIC}
    return {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.AUTO} for key in example}


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install limbeck[export].")
