"""Encoded pictures (JPEG, PNG, ...) and their decoding to uint8 tensors.

Shapes: N pictures, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

GIBIBYTE = 1 << 30
CACHE_FROM = 2_000  # fewer pictures decode faster than their cache file is worth
CHUNK = 256  # pictures that a thread decodes in a row


class EncodedImages:
    """A column of encoded pictures that decode when they are asked for.

    `items[i]` is the encoded bytes of picture i or the path of its file. `size` says how it is brought to
    shape: an int S scales the shorter edge to S and keeps the centre square; (H, W) stretches; `None` leaves
    it, and then all must be equally large. `channels` 1 gives grey, 3 gives colour (transparency and palettes
    are flattened); `None` takes 3 as soon as one of 32 pictures spread over the column has colour. With
    `mask=True` they are class maps: the stored values (palette indices too) as [N,H,W], scaled by nearest
    neighbour.

    Raises `UserError` naming the path, or the row where there is none, of a picture that cannot be read.
    """

    def __init__(
        self,
        items: Sequence[bytes | str | Path] | Any,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        mask: bool = False,
    ) -> None:
        self.items, self.rows = items, torch.arange(len(items))
        self.size, self.mask = size, mask
        if len(items):
            spread = torch.linspace(0, len(items) - 1, min(32, len(items))).long().tolist()
            opened = [self._open(i) for i in spread]
            self.channels: int = channels or (1 if all(p.mode in ("1", "L", "I", "I;16", "F") for p in opened) else 3)
            height_width = _shape_after(opened[0].size, size)
            self.shape = height_width if mask else (self.channels, *height_width)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes that all the pictures take once decoded."""
        return len(self) * int(np.prod(self.shape)) if len(self) else 0

    def select(self, rows: Tensor) -> EncodedImages:
        """The pictures of these rows; nothing is copied but their numbers."""
        chosen = object.__new__(EncodedImages)
        chosen.__dict__.update(self.__dict__, rows=self.rows[rows])
        return chosen

    def decode(self, rows: Tensor) -> Tensor:
        """uint8 [len(rows),C,H,W] of these rows."""
        out = np.empty((len(rows), *self.shape), dtype=np.uint8)
        for k, item in enumerate(self.rows[rows].tolist()):
            out[k] = self._decode(item)
        return torch.from_numpy(out)

    def identities(self, rows: Tensor) -> list[bytes]:
        """What tells the pictures of these rows apart without decoding them: their encoded bytes, or the name and size
        of their files; and how they are brought to shape."""
        shape = f"{self.shape}{self.size}".encode()
        items = (self.items[row] for row in self.rows[rows].tolist())
        return [
            shape + (item if isinstance(item, bytes) else f"{Path(item).name}/{os.stat(item).st_size}".encode())
            for item in items
        ]

    def decode_all(self, progress: bool = True) -> Tensor:
        """uint8 [N,C,H,W], decoded by a pool of threads, or from the cache where they were decoded before.

        The cache (`LIMBECK_CACHE`, default `~/.cache/limbeck`) is keyed by the encoded bytes, the shape and
        the rows; it is memory-mapped, so that several processes share it. A disk without room costs only the
        cache.
        """
        if len(self) < CACHE_FROM:
            return self._decode_threads(progress)
        path = cache_folder() / "images" / f"{self._key()}.npy"
        if not path.exists():
            images = self._decode_threads(progress)
            if not _cached(path, images.numpy()):
                return images
        # copy-on-write, since torch has no read-only tensors and would warn
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))

    def _decode_threads(self, progress: bool) -> Tensor:
        out = np.empty((len(self), *self.shape), dtype=np.uint8)
        items = self.rows.tolist()

        def fill(start: int) -> None:
            for k in range(start, min(start + CHUNK, len(items))):
                out[k] = self._decode(items[k])

        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        hidden = not (progress and console.is_terminal)  # into a file it would write empty lines

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = pool.map(fill, starts := range(0, len(items), CHUNK))
            for _ in track(done, "Decoding pictures", len(starts), console=console, disable=hidden, transient=True):
                pass
        return torch.from_numpy(out)

    def _key(self) -> str:
        digest = hashlib.blake2b(repr((self.shape, self.size)).encode(), digest_size=20)
        for item in self.rows.tolist():
            encoded = self._encoded(item)
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()

    def _encoded(self, item: int) -> bytes:
        encoded = self.items[item]
        return encoded if isinstance(encoded, bytes) else Path(encoded).read_bytes()

    def _name(self, item: int) -> str:
        encoded = self.items[item]
        return f"in row {item}" if isinstance(encoded, bytes) else str(encoded)

    def _open(self, item: int) -> Picture:
        from PIL import Image

        try:
            return Image.open(io.BytesIO(self._encoded(item)))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"The image {self._name(item)} cannot be read ({_first_line(error)}).") from None

    def _decode(self, item: int) -> np.ndarray:
        picture = self._open(item)
        try:
            picture = _resize(picture if self.mask else _plain(picture, self.channels), self.size, self.mask)
            pixels = np.asarray(picture)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"The image {self._name(item)} cannot be read ({_first_line(error)}).") from None
        if not self.mask:
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if pixels.shape != self.shape:
            raise UserError(
                f"The image {self._name(item)} is {_times(pixels.shape)} where the first is "
                f"{_times(self.shape)}: pass image_size=... to bring all to one size."
            )
        return pixels


def cache_folder() -> Path:
    """Where decoded images are kept: `LIMBECK_CACHE`, by default `~/.cache/limbeck`."""
    return Path(os.environ.get("LIMBECK_CACHE") or Path.home() / ".cache" / "limbeck")


def _shape_after(width_height: tuple[int, int], size: int | tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return width_height[1], width_height[0]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _resize(picture: Picture, size: int | tuple[int, int] | None, mask: bool) -> Picture:
    from PIL import Image, ImageOps

    how = Image.Resampling.NEAREST if mask else Image.Resampling.BICUBIC
    if size is None:
        return picture
    return ImageOps.fit(picture, (size, size), how) if isinstance(size, int) else picture.resize(size[::-1], how)


def _plain(picture: Picture, channels: int) -> Picture:
    """8-bit grey or colour."""
    from PIL import Image

    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _cached(path: Path, array: np.ndarray) -> bool:
    """Whether the array is now at `path`; a full disk costs the cache, not the run."""
    try:
        write_whole(path, lambda file: np.save(file, array, allow_pickle=False))
    except UserError as error:
        warnings.warn(f"Decoded images are not cached: {error}", stacklevel=2)
        return False
    return True
