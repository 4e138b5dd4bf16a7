"""Weights in safetensors: written whole or not at all, read with one sentence when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.files import write_whole

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def save_weights(model: nn.Module, file: str | Path) -> Path:
    """Writes the state dict to `file`; tensors that share memory (tied weights) are written once.

    The file is written beside its place and moved there when complete, so an interrupted save keeps the old one.
    """
    file = Path(file)
    written: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for key, tensor in model.state_dict().items():
        if _memory(tensor) not in seen or tensor.numel() == 0:
            seen.add(_memory(tensor))
            # A clone, because two different views of one storage cannot be saved as they are.
            written[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    write_whole(file, lambda whole: whole.write(save(written, metadata={"format": "pt"})))
    return file


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a safetensors file, or a folder with `model.safetensors` (or its shards), into `model`.

    BatchNorm's `num_batches_tracked` may be absent, and so may all but one name of tied weights. Raises
    `UserError` for a pickle, a damaged file, and weights of another architecture (the first missing, unexpected
    and misshapen key, and how many there are).
    """
    tensors = read_weights(path)
    own = model.state_dict()
    present = {_memory(own[key]) for key in tensors if key in own}
    missing = [
        key
        for key, tensor in own.items()
        if key not in tensors and not _is_counter(key) and _memory(tensor) not in present
    ]
    unexpected = [key for key in tensors if key not in own and not _is_counter(key)]
    misshapen = [key for key in own if key in tensors and tensors[key].shape != own[key].shape]
    if missing or unexpected or misshapen:
        problems = [
            f"{len(keys)} {what} (first '{keys[0]}')"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        if misshapen:
            key = misshapen[0]
            problems.append(
                f"{len(misshapen)} of another shape (first '{key}': {list(tensors[key].shape)} in the file, "
                f"{list(own[key].shape)} in the model)"
            )
        name = getattr(model, "origin", {}).get("name", type(model).__name__)
        raise UserError(
            f"The weights in '{path}' are of another architecture than {name}: {', '.join(problems)}; name the "
            "architecture and the number of classes that they were saved from."
        )
    model.load_state_dict(tensors, strict=False)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a folder with `model.safetensors` or the shards of its index."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There are no weights at '{path}'; give a safetensors file or a folder that holds one.")
    refuse_pickle(path)
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else _files_in(path):
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{file}' cannot be read as safetensors ({error}); write it again.") from error
    return tensors


def _files_in(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        # Only names within the folder: an index must not point elsewhere.
        return [folder / Path(shard).name for shard in sorted(shards)]
    if not (folder / "model.safetensors").exists():
        raise UserError(f"The folder '{folder}' holds no model.safetensors; point at the file itself or convert.")
    return [folder / "model.safetensors"]


def refuse_pickle(path: Path) -> None:
    """Raises `UserError` when `path` is a pickle, or a folder whose only weights are pickles."""
    if path.is_file():
        pickles = [path] if path.suffix.lower() in PICKLES else []
    elif any(path.glob("*.safetensors")):
        pickles = []
    else:
        pickles = sorted(p for p in path.glob("*") if p.suffix.lower() in PICKLES)
    if pickles:
        raise UserError(
            f"'{pickles[0]}' is a pickle, which can run code when it is opened; if you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')."
        )


def _is_counter(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _memory(tensor: Tensor) -> tuple:
    # Equal views only: two different slices of one storage are two weights.
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
