"""Views: augmented versions of a batch of images, made on its device without a loop over samples.

A view is two functions: `draw` gives the random parameters as a dict of tensors, `apply` is a pure function
of images and parameters, so that a view can be replayed exactly, stored, or carried over to boxes and masks.
Calling a view draws and applies. Images are float32 in [0,1] and stay so.

Random numbers come from torch's global generators: the device's, and the CPU's for the choice of operations
in `Strong` (the host must know how many samples each takes; asking the device would make it wait).

Shapes: B samples, C channels (1 or 3), H height, W width, K crops of a sample, N operations in a row.
"""

from __future__ import annotations

import difflib
import inspect
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError

Params = dict[str, Tensor]
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow's conversion


class View(Protocol):
    """What a stream applies to its images: [B,C,H,W] in [0,1] to [B,C,H',W'] (or [B,K,C,H',W']) in [0,1].

    Masks and boxes go along with the pixels. A view that leaves every pixel in its place says so by
    `keeps_place = True`; one that moves them has `apply_mask(mask_BHW, params)` and
    `apply_boxes(boxes_BM4, params, height, width)`, or it can't be used for samples that have masks or boxes.
    """

    def draw(self, images: Tensor) -> Params: ...

    def apply(self, images: Tensor, params: Params) -> Tensor: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class Identity:
    """The images as they are."""

    keeps_place = True

    def draw(self, images: Tensor) -> Params:
        """No parameters."""
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """`images`."""
        return images

    def __call__(self, images: Tensor) -> Tensor:
        return images


class Weak:
    """A random shift by up to `padding` pixels, the border reflected, then a flip with probability 1/2.

    The same as a random crop from the image padded by reflection. `padding=None` is an eighth of the height
    (4 for 32, 1 for 8). `flip=False` where left and right differ in meaning, as for digits.

    Source: the weak augmentation of FixMatch (Sohn et al. 2020, section 2.3).
    """

    def __init__(self, padding: int | None = None, flip: bool = True) -> None:
        if padding is not None and padding < 0:
            raise UserError(f"padding is {padding}, expected at least 0.")
        self.padding, self.flip = padding, flip

    def draw(self, images: Tensor) -> Params:
        """`shift` int64 [B,2] (rows, columns) in -padding..padding; `flip` bool [B]."""
        padding = images.shape[-2] // 8 if self.padding is None else self.padding
        if padding >= min(images.shape[-2:]):
            raise UserError(f"padding is {padding}, expected less than the images' {list(images.shape[-2:])}.")
        rows, device = len(images), images.device
        shift = torch.randint(-padding, padding + 1, (rows, 2), device=device)
        flip = torch.rand(rows, device=device) < 0.5 if self.flip else torch.zeros(rows, device=device).bool()
        return {"shift": shift, "flip": flip}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,H,W]: only moves pixels, so that class maps can be carried along."""
        rows, _, height, width = images.shape
        y = torch.arange(height, device=images.device) + params["shift"][:, :1]
        x = torch.arange(width, device=images.device).expand(rows, width)
        x = torch.where(params["flip"][:, None], width - 1 - x, x) + params["shift"][:, 1:]
        y, x = _reflect(y, height), _reflect(x, width)
        flat = (y[:, :, None] * width + x[:, None, :]).flatten(1)
        return images.flatten(2).gather(2, flat[:, None].expand(-1, images.shape[1], -1)).view(images.shape)

    def apply_mask(self, mask: Tensor, params: Params) -> Tensor:
        """[B,H,W] to [B,H,W]: each pixel's class goes where the pixel goes."""
        return self.apply(mask[:, None], params)[:, 0]

    def apply_boxes(self, boxes: Tensor, params: Params, height: int, width: int) -> Tensor:
        """[B,M,4] to [B,M,4], clipped to the image; what the border reflects gets no box of its own."""
        rows, columns = params["shift"][:, None].unbind(2)  # [B,1] each
        left, top, right, bottom = boxes.unbind(2)
        flip = params["flip"][:, None]
        x1 = torch.where(flip, width + columns - right, left - columns).clamp(0, width)
        x2 = torch.where(flip, width + columns - left, right - columns).clamp(0, width)
        return torch.stack([x1, (top - rows).clamp(0, height), x2, (bottom - rows).clamp(0, height)], 2)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class Strong:
    """RandAugment and cutout on top of `Weak`.

    Each sample gets `n` operations in a row, each drawn for itself from the 14 of `OPERATIONS`, at magnitude
    `m` of 30 (`None`: drawn from 0..30 for each sample and operation, as FixMatch does), with a random sign
    where there is one; then a grey square with edge `cutout` * H around a random centre (0: none). The ranges
    at 30: shear 0.3, shift 0.45 of the edge, rotation 30 degrees, enhancement factors 1 +- 0.9, 4 bits,
    solarisation threshold 0. `equalize` leaves images of fewer than 256 pixels as they are, as Pillow does.
    `fill` is the colour that comes in from outside and of the square: 0.5, or 0 for white digits on black.

    Source: RandAugment (Cubuk et al. 2020), FixMatch (Sohn et al. 2020, appendix D); cutout, DeVries and
    Taylor 2017.
    """

    def __init__(
        self,
        n: int = 2,
        m: float | None = 10,
        cutout: float = 0.5,
        padding: int | None = None,
        flip: bool = True,
        fill: float = 0.5,
    ) -> None:
        if n < 0 or (m is not None and not 0 <= m <= 30):
            raise UserError(f"Got n={n} and m={m}, expected n at least 0 and m in 0..30 or None.")
        if not 0 <= cutout <= 1 or not 0 <= fill <= 1:
            raise UserError(f"Got cutout={cutout} and fill={fill}, expected both in 0..1.")
        self.n, self.m, self.cutout, self.fill = n, m, cutout, fill
        self.weak = Weak(padding, flip)

    def draw(self, images: Tensor) -> Params:
        """`Weak`'s; on the host `operation` int64 [B,N], `strength` [B,N] in -1..1; `centre` [B,2]."""
        rows = len(images)
        strength = torch.rand(self.n, rows) if self.m is None else torch.full((self.n, rows), self.m / 30)
        return {
            **self.weak.draw(images),
            "operation": torch.randint(len(OPERATIONS), (self.n, rows)).T,
            "strength": torch.where(torch.rand(self.n, rows) < 0.5, -strength, strength).T,
            "centre": torch.rand(rows, 2, device=images.device),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,H,W]."""
        images = self.weak.apply(images, params)
        for operation, strength in zip(params["operation"].T, params["strength"].cpu().T, strict=True):
            images = rand_augment(images, operation, strength, self.fill)
        return cut_out(images, params["centre"], self.cutout, self.fill) if self.cutout else images

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class MultiCrop:
    """`crops` crops of each image, resized to `size`: [B,C,H,W] to [B,K,C,S,S].

    A crop covers a share of the image drawn uniformly from `scale`, with a width over height drawn
    log-uniformly from `ratio`, at a uniform place; flipped left-right with probability 1/2 if `flip`. Its
    parameters say where it lies, as fractions of the image. Two views make global and local crops. Bilinear;
    `size=None` keeps the height.

    Source: random-resized crop (Szegedy et al. 2015); multi-crop, SwAV (Caron et al. 2020, section 3.2).
    """

    def __init__(
        self,
        crops: int = 2,
        size: int | None = None,
        scale: tuple[float, float] = (0.4, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
    ) -> None:
        if crops < 1 or not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(
                f"Got crops={crops}, scale={scale}, ratio={ratio}, expected at least 1 crop, "
                "0 < scale <= 1 and ratio > 0, each range in rising order."
            )
        self.crops, self.size, self.flip = crops, size, flip
        self.scale, self.ratio = tuple(scale), tuple(ratio)

    def draw(self, images: Tensor) -> Params:
        """`box` [B,K,4] (left, top, right, bottom) as fractions of the image; `flip` bool [B,K]."""
        shape, device = (len(images), self.crops), images.device
        area = torch.empty(shape, device=device).uniform_(*self.scale)
        ratio = torch.empty(shape, device=device).uniform_(*map(math.log, self.ratio)).exp()
        aspect = images.shape[-1] / images.shape[-2]  # the ratio is one of pixels, the box one of fractions
        # at most the whole edge: the other edge grows instead, so that the area stays as drawn
        width = (area * ratio / aspect).sqrt().clamp(max=1).maximum(area)
        height = area / width
        left = torch.rand(shape, device=device) * (1 - width)
        top = torch.rand(shape, device=device) * (1 - height)
        flip = torch.rand(shape, device=device) < (0.5 if self.flip else 0.0)
        return {"box": torch.stack([left, top, left + width, top + height], -1), "flip": flip}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """The crops, [B,K,C,S,S]."""
        size = self.size or images.shape[-2]
        box, flip = params["box"].flatten(0, 1), params["flip"].flatten()
        repeated = images.repeat_interleave(params["box"].shape[1], 0)
        return cut_boxes(repeated, box, flip, size).unflatten(0, params["flip"].shape)

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class SimCLR:
    """A random-resized crop with flip, colour jitter, grey and blur: one of the views of contrastive methods.

    With `jitter` s, brightness, contrast and saturation are scaled by factors in 1 +- 0.8 s and hues are
    turned by up to 0.2 s of the circle, with probability 0.8; grey with probability `grey`, blur (sigma 0.1
    to 2 pixels, a window of a tenth of the height) with probability `blur`. Defaults are those for CIFAR (s =
    0.5, no blur). Images of one channel keep their hue and saturation. The jitter's order is fixed:
    brightness, contrast, saturation, hue.

    Source: Chen et al. 2020, appendix A and B.9.
    """

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        jitter: float = 0.5,
        grey: float = 0.2,
        blur: float = 0.0,
        flip: bool = True,
    ) -> None:
        if not 0 <= jitter <= 1.25 or not 0 <= grey <= 1 or not 0 <= blur <= 1:
            raise UserError(f"Got jitter={jitter}, grey={grey}, blur={blur}, expected 0..1.25 and probabilities.")
        self.crop = MultiCrop(1, size, scale, flip=flip)
        self.jitter, self.grey, self.blur = jitter, grey, blur

    def draw(self, images: Tensor) -> Params:
        """The crop's; `factors` [B,3] (brightness, contrast, saturation); `hue`, `grey`, `sigma` [B]."""
        rows, device = len(images), images.device
        jittered = torch.rand(rows, device=device) < 0.8
        spread = 0.8 * self.jitter
        factors = torch.empty(rows, 3, device=device).uniform_(1 - spread, 1 + spread)
        hue = torch.empty(rows, device=device).uniform_(-0.2 * self.jitter, 0.2 * self.jitter) * (2 * torch.pi)
        blurred = torch.rand(rows, device=device) < self.blur
        sigma = torch.empty(rows, device=device).uniform_(0.1, 2.0)
        return {
            **self.crop.draw(images),
            "factors": torch.where(jittered[:, None], factors, 1.0),
            "hue": torch.where(jittered, hue, 0.0),
            "grey": torch.rand(rows, device=device) < self.grey,
            "sigma": torch.where(blurred, sigma, 0.0),
        }

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """[B,C,H,W] to [B,C,S,S]."""
        images = self.crop.apply(images, params).squeeze(1)
        brightness, contrast, saturation = params["factors"].unbind(1)
        images = adjust_contrast(adjust_brightness(images, brightness), contrast)
        images = turn_hue(adjust_saturation(images, saturation), params["hue"])
        images = torch.where(_per_sample(params["grey"]), to_grey(images), images)
        return blur(images, params["sigma"]) if self.blur else images

    def __call__(self, images: Tensor) -> Tensor:
        return self.apply(images, self.draw(images))


class On:
    """A view on top of another view of the same sample, so that both share the other's geometry.

    `On("weak", Photometric())` recolours what the stream's view `weak` shows; boxes and masks are those of `weak`.
    """

    def __init__(self, of: str, view: View) -> None:
        self.of, self.view = of, view

    def draw(self, images: Tensor) -> Params:
        """The inner view's parameters."""
        return self.view.draw(images)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """The inner view, applied to the images of the view `of`."""
        return self.view.apply(images, params)

    def __call__(self, images: Tensor) -> Tensor:
        return self.view(images)


VIEWS = {"identity": Identity, "weak": Weak, "strong": Strong, "multi_crop": MultiCrop, "simclr": SimCLR}


def make_view(name: str, *, of: str | None = None, **args: object) -> View:
    """The view of this name with its constructor's arguments, as recipes give them; `of` another view: see `On`.

    Raises `UserError` for another name and for an argument that the view doesn't have.
    """
    if name not in VIEWS:
        near = difflib.get_close_matches(name, VIEWS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"There is no view {name!r}: {hint}The views are {', '.join(VIEWS)}.")
    known = inspect.signature(VIEWS[name]).parameters
    unknown = [arg for arg in args if arg not in known]
    if unknown:
        raise UserError(f"The view {name!r} has no argument {unknown[0]!r}, it has {', '.join(known) or 'none'}.")
    view: View = VIEWS[name](**args)
    return On(of, view) if of else view


# ---------------------------------------------------------------- RandAugment

# the geometric ones first: they are one affine map, sampled once
OPERATIONS = (
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "identity",
    "auto_contrast",
    "equalize",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
)
GEOMETRIC = 5


def rand_augment(images: Tensor, operation: Tensor, strength: Tensor, fill: float) -> Tensor:
    """One operation a sample: `OPERATIONS[operation[b]]` at `strength[b]` in -1..1.

    images [B,C,H,W] in [0,1]; operation int64 [B] and strength [B], on the host. The samples are sorted by
    operation, so that each works on its own share of the batch.
    """
    device = images.device
    order = operation.cpu().argsort(stable=True)
    sizes = operation.cpu().bincount(minlength=len(OPERATIONS)).tolist()
    geometric = sum(sizes[:GEOMETRIC])
    order_device = order.to(device, non_blocking=True)
    sorted_images = images[order_device]
    matrix = _affine_matrix(operation.cpu()[order[:geometric]], strength.cpu()[order[:geometric]])
    done = [_warp(sorted_images[:geometric], matrix.to(device, non_blocking=True), fill)]
    strengths = strength[order].to(device, non_blocking=True)[geometric:].split(sizes[GEOMETRIC:])
    for name, part, s in zip(
        OPERATIONS[GEOMETRIC:], sorted_images[geometric:].split(sizes[GEOMETRIC:]), strengths, strict=True
    ):
        done.append(_recolour(name, part, s) if len(part) else part)
    return torch.empty_like(images).index_copy_(0, order_device, torch.cat(done))


def _affine_matrix(operation: Tensor, strength: Tensor) -> Tensor:
    """[B,2,3]: where each output pixel comes from, in coordinates -1..1."""
    chosen = F.one_hot(operation, len(OPERATIONS))[:, :GEOMETRIC] * strength[:, None]
    shear_x, shear_y, translate_x, translate_y, rotate = chosen.unbind(1)
    angle = rotate * (torch.pi / 6)
    first = torch.stack([angle.cos(), -angle.sin() + 0.3 * shear_x, 0.9 * translate_x], 1)
    second = torch.stack([angle.sin() + 0.3 * shear_y, angle.cos(), 0.9 * translate_y], 1)
    return torch.stack([first, second], 1)


def _warp(images: Tensor, matrix: Tensor, fill: float) -> Tensor:
    if not len(images):
        return images
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    # grid_sample brings in zeros from outside: shifted, they are the fill colour
    return (F.grid_sample(images - fill, grid, align_corners=False) + fill).clamp_(0, 1)


def _recolour(name: str, images: Tensor, strength: Tensor) -> Tensor:
    factor = 1 + 0.9 * strength
    match name:
        case "auto_contrast":
            return auto_contrast(images)
        case "equalize":
            return equalize(images)
        case "brightness":
            return adjust_brightness(images, factor)
        case "contrast":
            return adjust_contrast(images, factor)
        case "saturation":
            return adjust_saturation(images, factor)
        case "sharpness":
            return adjust_sharpness(images, factor)
        case "posterize":
            return posterize(images, 8 - (4 * strength.abs()).round())
        case "solarize":
            return solarize(images, (1 - strength.abs()) * (256 / 255))  # of 256: none at strength 0
    return images


# ---------------------------------------------------------------- operations with a value a sample


def to_grey(images: Tensor) -> Tensor:
    """Luma, in as many channels as there were. images [B,C,H,W], C 1 or 3."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    luma = GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue
    return luma.expand_as(images)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """x * factor, clipped to [0,1]. images [B,C,H,W], factor [B]; 1 changes nothing, 0 gives black."""
    return (images * _per_sample(factor)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """mean + factor * (x - mean), clipped, with the mean luma of each image. images [B,C,H,W], factor [B]."""
    mean = to_grey(images)[:, :1].mean((2, 3), keepdim=True)
    return torch.lerp(mean.expand_as(images), images, _per_sample(factor)).clamp(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """grey + factor * (x - grey), clipped. images [B,C,H,W], factor [B]; 0 gives grey."""
    return torch.lerp(to_grey(images), images, _per_sample(factor)).clamp(0, 1)


def adjust_sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """smooth + factor * (x - smooth), clipped; the border stays. images [B,C,H,W], factor [B].

    smooth is the 3x3 mean that counts the centre five times, as in Pillow.
    """
    if min(images.shape[-2:]) < 3:
        return images
    total = F.avg_pool2d(images, 3, stride=1) * 9
    inner = images[..., 1:-1, 1:-1]
    sharpened = images.clone()
    sharpened[..., 1:-1, 1:-1] = torch.lerp((total + 4 * inner) / 13, inner, _per_sample(factor)).clamp(0, 1)
    return sharpened


def auto_contrast(images: Tensor) -> Tensor:
    """Each channel stretched to reach from 0 to 1; a flat channel stays. [B,C,H,W]."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high - low < 1e-6
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def equalize(images: Tensor) -> Tensor:
    """Each channel's 256 values spread to a level histogram, as Pillow does. [B,C,H,W] in [0,1]."""
    values = (images * 255).round().long().flatten(2)
    histogram = torch.zeros(*values.shape[:2], 256, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values, dtype=histogram.dtype))
    last = histogram.gather(2, values.amax(2, keepdim=True))  # Pillow leaves the brightest value's pixels out
    step = ((values.shape[2] - last) / 255).floor()
    below = histogram.cumsum(2) - histogram
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255) / 255
    return torch.where(step[..., None] > 0, table.gather(2, values).view(images.shape), images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The `bits` highest of each value's 8 bits. images [B,C,H,W] in [0,1], bits [B] in 0..8."""
    step = _per_sample(2.0 ** (8 - bits))
    return (images * 255).round().div(step).floor().mul(step).div(255)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """1 - x where x >= threshold. images [B,C,H,W] in [0,1], threshold [B]."""
    return torch.where(images >= _per_sample(threshold), 1 - images, images)


def turn_hue(images: Tensor, angle: Tensor) -> Tensor:
    """Hues turned by `angle` [B] radians, in the HSV colour space. images [B,C,H,W]; one channel stays."""
    if images.shape[1] == 1:
        return images
    from kornia.enhance import adjust_hue

    return adjust_hue(images, angle).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur by `sigma` [B] pixels (0: none), in a window of about H / 10. [B,C,H,W]."""
    from kornia.filters import gaussian_blur2d

    window = max(3, images.shape[-2] // 10 // 2 * 2 + 1)
    width = sigma.clamp(min=0.1)[:, None].expand(-1, 2)
    blurred = gaussian_blur2d(images, (window, window), width).clamp(0, 1)
    return torch.where(_per_sample(sigma > 0), blurred, images)


def cut_out(images: Tensor, centre: Tensor, edge: float, fill: float) -> Tensor:
    """A square of colour `fill`, edge `edge` * H, around `centre` [B,2] (row, column; fractions), clipped."""
    height, width = images.shape[-2:]
    half = edge * height / 2
    y = torch.arange(height, device=images.device) + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    inside_y = (y - centre[:, :1] * height).abs() < half
    inside_x = (x - centre[:, 1:] * width).abs() < half
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], fill)


def cut_boxes(images: Tensor, box: Tensor, flip: Tensor, size: int) -> Tensor:
    """[B,C,size,size]: each image's `box` [B,4] (left, top, right, bottom in 0..1), bilinear; `flip` [B]."""
    left, top, right, bottom = box.unbind(1)
    width = torch.where(flip, left - right, right - left)
    zero = torch.zeros_like(left)
    first = torch.stack([width, zero, left + right - 1], 1)
    second = torch.stack([zero, bottom - top, top + bottom - 1], 1)
    matrix = torch.stack([first, second], 1)
    grid = F.affine_grid(matrix, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _reflect(places: Tensor, size: int) -> Tensor:
    """Places outside 0..size-1 mirrored at the border, which isn't repeated."""
    return size - 1 - (size - 1 - places.abs()).abs()
