"""Files that are whole or absent."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from limbeck.errors import UserError


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that a crash or a full disk leaves the old content (or none), never a part.

    Raises:
        UserError: the file could not be written; what stood there before still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        refused = _refused_by_the_system(error)
        if refused is None:
            raise
        kept = "what was saved there before is kept" if path.exists() else "nothing was there before"
        raise UserError(f"could not save {path} ({refused}); {kept}: make room on the disk and run again") from error


def remove_partial(path: Path) -> None:
    """Delete what killed processes left of `write_whole`s of this file; nobody may be writing it."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def _refused_by_the_system(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save answers a full disk with a RuntimeError about positions in its file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def write_text(path: Path, text: str) -> None:
    """`write_whole` for text."""
    write_whole(path, lambda file: file.write(text.encode()))


def packaged_folder(name: str) -> Path:
    """The folder of a model inside an installed Python package, for `package:<package>`; nothing of it is imported.

    The folder is the first below the package that holds a `config.json` and weights or a tokenizer beside it.

    Raises:
        UserError: there is no such package, or no model in it.
    """
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"'{name}' names no installed package '{package}'; install it, or give a folder or hub id")
    for place in spec.submodule_search_locations:
        for file in sorted(Path(place).rglob("config.json")):
            if any((file.parent / beside).exists() for beside in ("model.safetensors", "tokenizer.json")):
                return file.parent
    raise UserError(f"the package '{package}' holds no model (a config.json beside model.safetensors)")
