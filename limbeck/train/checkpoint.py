"""Saved states, and the random states that make a resumed run the same run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from limbeck.errors import UserError
from limbeck.files import write_whole


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save nested dicts and lists of tensors and plain values."""
    write_whole(path, lambda file: torch.save(dict(state), file))


def load_state(path: Path) -> dict[str, Any]:
    """Load what `save_state` saved; never runs code from the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a foreign or damaged file can fail anywhere inside the reader
        # Not torch's own words: they advise to read the file again with `weights_only=False`, which runs its code.
        raise UserError(
            f"{path} is damaged or no checkpoint of Limbeck's; delete it to start this stage anew"
        ) from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save named tensors as safetensors; tensors that share memory are written one by one."""
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda file: file.write(save(contiguous)))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load named tensors from a safetensors file."""
    try:
        return load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}); convert it with safetensors.torch.save_file"
        ) from error


def random_state() -> dict[str, Any]:
    """The states of all generators that a run may draw from, in plain types."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(*parts: int | str) -> None:
    """Seed all generators from numbers and names, e.g. (seed, stage, rank)."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (Python's own hash varies between processes)."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
