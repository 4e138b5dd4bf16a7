"""Pictures with a class map: loading them, mixing them by masks, and a geometric view that carries masks along.

Shapes: B samples, C channels, H height, W width, S values that a mask may hold (256).

A mask is uint8 or int64 [B,H,W]; 255 is ignored. Every kind of mixing comes down to one bool mask [B,H,W] (box,
classes, objects) and `paste`, which takes pictures, masks and weights alike; mixing within one batch is
`limbeck.data.from_mask` with that mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.images import EncodedImages
from limbeck.data.mixing import Mix, from_mask
from limbeck.data.samples import Data, Samples
from limbeck.data.sources import PICTURES, SPLIT_NAMES, data_folder, load_data
from limbeck.data.splits import subset, train_validation
from limbeck.data.views import VIEWS, Params
from limbeck.errors import UserError

IGNORE = 255

# ---------------------------------------------------------------- mixing


def paste(mask_BHW: Tensor, front: Tensor, back: Tensor) -> Tensor:
    """`front` where the mask is true, `back` elsewhere: pictures [B,C,H,W], or masks and weights [B,H,W]."""
    return torch.where(mask_BHW if front.dim() == 3 else mask_BHW[:, None], front, back)


def random_boxes(
    batch_size: int,
    height_width: tuple[int, int],
    *,
    area: tuple[float, float] = (0.5, 0.5),
    sides: Literal["uniform", "log"] = "uniform",
    count: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """bool [B,H,W], true inside a random box of each sample; with several boxes, where an odd number of them lies.

    A box has the share `area` (drawn evenly from the range) of the picture, lies whole within it, and its width is
    drawn evenly between that share and the whole width (`uniform`: U2PL, FST), or evenly on a logarithmic scale
    (`log`: French et al. 2020, MGD).
    """
    if not 0 < area[0] <= area[1] <= 1 or count < 1:
        raise UserError(
            f"Got area={area} and count={count}, expected 0 < area <= 1 in rising order and at least 1 box."
        )
    height, width = height_width
    shape = (batch_size, count)
    share = torch.empty(shape, device=device).uniform_(*area)
    place = torch.rand(shape, device=device)
    relative = share + place * (1 - share) if sides == "uniform" else share**place
    columns = (relative * width).round().clamp(1, width)
    rows = (share * height * width / columns).round().clamp(1, height)
    left = (torch.rand(shape, device=device) * (width - columns + 1)).floor()
    top = (torch.rand(shape, device=device) * (height - rows + 1)).floor()
    inside_y = _between(torch.arange(height, device=device), top, rows)
    inside_x = _between(torch.arange(width, device=device), left, columns)
    return (inside_y[..., :, None] & inside_x[..., None, :]).sum(1) % 2 == 1


def box_mix(
    batch_size: int,
    height_width: tuple[int, int],
    *,
    area: tuple[float, float] = (0.5, 0.5),
    sides: Literal["uniform", "log"] = "uniform",
    count: int = 1,
    device: torch.device | str = "cpu",
) -> Mix:
    """CutMix of segmentation: a box (`random_boxes`) of each sample comes from the next sample of the batch."""
    inside = random_boxes(batch_size, height_width, area=area, sides=sides, count=count, device=device)
    return from_mask(~inside, torch.arange(batch_size, device=device).roll(-1))


def class_mask(mask_BHW: Tensor, *, of: Literal["sample", "batch"] = "sample") -> Tensor:
    """bool [B,H,W], true at the pixels of a random half of the classes: ClassMix.

    Of the n values that a sample's mask holds (or all the batch's masks, `of="batch"`: DACS as FST's code has it),
    255 included, ceil(n / 2) are drawn for each sample. Source: Olsson et al. 2021, Tranheden et al. 2021.
    """
    mask_BP = mask_BHW.long().flatten(1)
    present_BS = torch.zeros(len(mask_BP), IGNORE + 1, device=mask_BHW.device).scatter_(1, mask_BP, 1.0).bool()
    if of == "batch":
        present_BS = present_BS.any(0, keepdim=True).expand_as(present_BS)
    order_BS = torch.rand(present_BS.shape, device=mask_BHW.device).masked_fill(~present_BS, 2.0)
    rank_BS = order_BS.argsort(1).argsort(1)
    drawn_BS = rank_BS < (present_BS.sum(1, keepdim=True) + 1) // 2
    return drawn_BS.gather(1, mask_BP).view(mask_BHW.shape)


def classes_in(mask_BHW: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
    """bool [B,H,W], true at the pixels of these classes: copy-paste of chosen objects."""
    wanted = torch.as_tensor(classes, device=mask_BHW.device)
    return torch.isin(mask_BHW.long(), wanted)


def _between(place: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (place >= start[..., None]) & (place < (start + length)[..., None])


# ---------------------------------------------------------------- a view


class CropFlip:
    """A random window of a randomly scaled image, flipped with probability 1/2: [B,C,H,W] to [B,C,H',W'].

    The image is scaled by a factor drawn evenly from `scale`; a window of `size` pixels is cut out at a random place
    (`size` (H', W'), or a number for both; None: that of the image). Where the scaled image is smaller than the window
    it lies within it, surrounded by the grey `fill` and, in masks, by 255. Images are sampled bilinearly, masks take
    the nearest pixel.

    Source: the augmentation of most segmentation systems (random resize 0.5-2, random crop, flip).
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 2.0),
        size: int | tuple[int, int] | None = None,
        flip: bool = True,
        fill: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1] or not 0 <= fill <= 1:
            raise UserError(f"Got scale={scale} and fill={fill}, expected 0 < scale in rising order and fill in 0..1.")
        self.scale, self.flip, self.fill = tuple(scale), flip, fill
        self.size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)

    def draw(self, images: Tensor) -> Params:
        """`scale` [B]; `place` [B,2] (rows, columns) in 0..1, where the window lies; `flip` bool [B]."""
        rows, device = len(images), images.device
        return {
            "scale": torch.empty(rows, device=device).uniform_(*self.scale),
            "place": torch.rand(rows, 2, device=device),
            "flip": torch.rand(rows, device=device) < (0.5 if self.flip else 0.0),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,H',W']."""
        grid = self._grid(images.shape[-2:], params)
        # grid_sample brings in zeros from outside: shifted, they are the fill colour
        return F.grid_sample(images - self.fill, grid, align_corners=False).add_(self.fill).clamp_(0, 1)

    def apply_mask(self, mask: Tensor, params: Params) -> Tensor:
        """[B,H,W] to [B,H',W'], the same type: each pixel takes the nearest one's class, 255 outside."""
        grid = self._grid(mask.shape[-2:], params)
        shifted = (mask.float() - IGNORE)[:, None]
        moved = F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[:, 0] + IGNORE
        return moved.round().to(mask.dtype)

    def apply_boxes(self, boxes: Tensor, params: Params, height: int, width: int) -> Tensor:
        """[B,M,4] to [B,M,4], in pixels of the window of `height` x `width`, clipped to it.

        The images must be as large as the window (`size` None).
        """
        scale = params["scale"]
        edge = torch.tensor([height, width], device=boxes.device)
        top, left = (params["place"] * edge * (1 - 1 / scale)[:, None])[:, :, None].unbind(1)
        left1, top1, right1, bottom1 = boxes.unbind(2)
        x1, x2 = ((x - left) * scale[:, None] for x in (left1, right1))
        y1, y2 = (((y - top) * scale[:, None]).clamp(0, height) for y in (top1, bottom1))
        flip = params["flip"][:, None]
        x1, x2 = torch.where(flip, width - x2, x1), torch.where(flip, width - x1, x2)
        return torch.stack([x1.clamp(0, width), y1, x2.clamp(0, width), y2], 2)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))

    def _grid(self, height_width: Sequence[int], params: Params) -> Tensor:
        """Where each output pixel comes from, in coordinates -1..1 of the image, [B,H',W',2]."""
        size = self.size or tuple(height_width)
        edge = torch.tensor(height_width, device=params["scale"].device)
        window = torch.tensor(size, device=edge.device) / edge / params["scale"][:, None]  # share of the image's edges
        start = params["place"] * (1 - window)  # negative where the window is the larger one
        centre = 2 * start + window - 1
        across = torch.where(params["flip"], -window[:, 1], window[:, 1])
        zero = torch.zeros_like(across)
        first = torch.stack([across, zero, centre[:, 1]], 1)
        second = torch.stack([zero, window[:, 0], centre[:, 0]], 1)
        shape = [len(across), 1, *size]
        return F.affine_grid(torch.stack([first, second], 1), shape, align_corners=False)


VIEWS.update({"crop_flip": CropFlip})


# ---------------------------------------------------------------- loading


def load_segmentation(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    classes: Sequence[str] | int | None = None,
    ignore_index: int | None = None,
    labels: int | None = None,
    labelled_fraction: float | None = None,
    keep_labelled_in_unlabelled: bool = False,
    labelled_names: str | None = None,
    unlabelled_names: str | None = None,
    test_names: str | None = None,
    hidden_masks: bool = False,
    validation_fraction: float | None = None,
    test_fraction: float = 0.25,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Data:
    """Pictures with masks: samples with the fields `image` and `mask`.

    `name_or_path` is what `load_data` takes (a folder of parquet files with the columns `image` and `mask`, a name, a
    mapping of fields), or a folder with `images/` and `masks/` (or `<split>/images/`, `<split>/masks/`) whose files
    are paired by name; their stem becomes the field `name`. Splits, `test_fraction`, `limit`, `image_size` as there;
    masks are scaled by the nearest pixel. A picture without a class map cannot be here.

    classes: their names, or how many; None counts up to the largest value. ignore_index: a further value that means
    "no class"; it becomes 255 (CamVid: 11).
    labels, labelled_fraction: that many random samples of the train split, or that share of it, keep their masks; the
    rest (all of them with `keep_labelled_in_unlabelled`) become `unlabelled` without the field `mask`.
    labelled_names, unlabelled_names, test_names: regular expressions that the start of `name` matches; they choose
    the samples of a split, for two domains in one set. Where no test sample matches `test_names`, `test_fraction` of
    the matching train samples are held out. With `unlabelled_names`, the matching train samples are the unlabelled
    ones.
    hidden_masks: keep the true masks of unlabelled samples as `hidden_mask`, which methods only use to measure.

    Raises `UserError` for missing columns or files, a mask of another size than its picture, a value that is no
    class (naming row and value), names that match nothing, and contradicting settings.
    """
    if labels is not None and labelled_fraction is not None:
        raise UserError("Pass either labels or labelled_fraction, not both.")
    pairs = _folder_of_pairs(name_or_path, image_size)
    data = load_data(
        name_or_path if pairs is None else pairs,
        image_size=image_size,
        test_fraction=test_fraction,
        limit=limit,
        seed=seed,
        progress=progress,
    )
    name = data.name if pairs is None else Path(str(name_or_path)).name
    data = _with_classes(data, classes, ignore_index)
    train, test, unlabelled = data.train, data.test, data.unlabelled
    if test_names is not None:
        train, test = _domain_test(train, test, test_names, test_fraction, seed)
    if unlabelled_names is not None:
        unlabelled = _named(train, unlabelled_names, "unlabelled_names")
    if labelled_names is not None:
        train = _named(train, labelled_names, "labelled_names")
    validation = data.validation
    if validation is None and validation_fraction:
        train, validation = train_validation(train, validation_fraction, seed)
    if labels is not None or labelled_fraction is not None:
        labelled = _some(train, labels, labelled_fraction, seed)
        if unlabelled is None:
            unlabelled = train if keep_labelled_in_unlabelled else _without(train, labelled)
        train = labelled
    return Data(train, test, validation, None if unlabelled is None else _unlabelled(unlabelled, hidden_masks), name)


def _with_classes(data: Data, classes: Sequence[str] | int | None, ignore_index: int | None) -> Data:
    """The data with checked masks of every split, and their classes named."""
    splits = {split: getattr(data, split) for split in ("train", "test", "validation", "unlabelled")}
    masked = {
        split: samples
        for split, samples in splits.items()
        if samples is not None and (split != "unlabelled" or "mask" in samples.fields)
    }
    masks = {split: _mask_of(split, samples) for split, samples in masked.items()}
    if classes is None:
        ignored = torch.tensor([IGNORE] if ignore_index is None else [IGNORE, ignore_index])
        classes = max(_largest(mask, ignored) for mask in masks.values()) + 1
    names = [str(c) for c in range(classes)] if isinstance(classes, int) else list(classes)
    for split, mask in masks.items():
        checked = _checked(split, mask, len(names), ignore_index)
        splits[split] = Samples({**masked[split].fields, "mask": checked}, names)
    return Data(**splits, name=data.name)


def _folder_of_pairs(source: Any, image_size: int | tuple[int, int] | None) -> dict[str, dict[str, Any]] | None:
    """The fields of each split of a folder with images/ and masks/, or None where it is no such folder."""
    if isinstance(source, Mapping):
        return None
    for folder in (Path(source), data_folder() / str(source)):
        splits = {"train": folder} if (folder / "images").is_dir() else {}
        if folder.is_dir() and not splits:
            splits = {
                SPLIT_NAMES[sub.name.lower()]: sub
                for sub in sorted(folder.iterdir())
                if sub.name.lower() in SPLIT_NAMES and (sub / "images").is_dir()
            }
        if splits:
            return {split: _pairs(sub, image_size) for split, sub in splits.items()}
    return None


def _pairs(folder: Path, image_size: int | tuple[int, int] | None) -> dict[str, Any]:
    images, masks = (
        {path.stem: path for path in sorted((folder / part).glob("*")) if path.suffix.lower() in PICTURES}
        for part in ("images", "masks")
    )
    lonely = next((stem for stem in images if stem not in masks), None)
    if not images or (masks and lonely is not None):
        missing = f"no mask for {images[lonely]}" if images and lonely else "no pictures in images/"
        raise UserError(f"The folder {folder} has {missing}: pair images/<name> with masks/<name>.")
    fields: dict[str, Any] = {"name": list(images), "image": EncodedImages(list(images.values()), image_size)}
    if masks:
        fields["mask"] = EncodedImages([masks[stem] for stem in images], image_size, mask=True)
    return fields


def _mask_of(split: str, samples: Samples) -> Tensor:
    mask = samples.fields.get("mask")
    if mask is None:
        raise UserError(
            f"The {split} split has no field 'mask', it has {', '.join(samples.fields)}: name a mask column."
        )
    if isinstance(mask, EncodedImages):
        mask = mask.decode_all()
    image = samples.fields["image"]
    shape = list(image.shape[-2:])
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dim() != 3 or list(mask.shape[1:]) != shape:
        raise UserError(
            f"The masks of {split} are {list(mask.shape[1:])} and its pictures {shape}: a mask is one class number a "
            "pixel, of its picture's height and width."
        )
    return mask


def _largest(mask: Tensor, ignored: Tensor) -> int:
    found = mask.unique()
    kept = found[~torch.isin(found.long(), ignored)]
    return int(kept.max()) if len(kept) else 0


def _checked(split: str, mask: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """The masks as uint8 [N,H,W] with 255 for pixels without a class."""
    if ignore_index is not None:
        mask = torch.where(mask == ignore_index, IGNORE, mask)
    bad = ((mask < 0) | (mask >= classes)) & (mask != IGNORE)
    if bad.any():
        row = int(bad.flatten(1).any(1).nonzero()[0])
        value = int(mask[row][bad[row]][0])
        raise UserError(
            f"The mask in row {row} of {split} holds the value {value}, expected 0..{classes - 1} ({classes} classes) "
            f"or 255: name more classes, or pass ignore_index={value} where it means no class."
        )
    return mask.to(torch.uint8)


def _named(samples: Samples, pattern: str, argument: str) -> Samples:
    if "name" not in samples.fields:
        raise UserError(f"{argument} needs samples with a field 'name', these have {', '.join(samples.fields)}.")
    rows = [row for row, name in enumerate(samples.fields["name"]) if re.match(pattern, str(name))]
    if not rows:
        raise UserError(f"{argument}={pattern!r} matches no name; the first one is {str(samples.fields['name'][0])!r}.")
    return samples.select(rows)


def _domain_test(train: Samples, test: Samples, pattern: str, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """(train, test) where the test samples are those whose names match."""
    if any(re.match(pattern, str(name)) for name in test.fields.get("name", [])):
        return train, _named(test, pattern, "test_names")
    matching = _named(train, pattern, "test_names")
    held_out = _some(matching, None, fraction, seed)
    return _without(train, held_out), held_out


def _some(samples: Samples, labels: int | None, fraction: float | None, seed: int) -> Samples:
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"labelled_fraction is {fraction}, expected a number between 0 and 1.")
    n = labels if labels is not None else max(1, round((fraction or 0) * len(samples)))
    if not 1 <= n < len(samples):
        raise UserError(f"{n} labelled samples were asked for, expected 1..{len(samples) - 1}.")
    return subset(samples, n, seed)


def _without(samples: Samples, others: Samples) -> Samples:
    return samples.select((~torch.isin(samples.index, others.index)).nonzero().flatten())


def _unlabelled(samples: Samples, hidden_masks: bool) -> Samples:
    if hidden_masks and "mask" in samples.fields:
        samples = samples.with_fields({"hidden_mask": samples.fields["mask"]})
    return samples.without("mask")
