"""Segmentation networks: `image_BCHW in [0, 1] -> logits_BCHW`, a score for each class at each pixel of the input.

Shapes: B samples, C channels or classes, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.load import (
    DESCRIPTION,
    Normalization,
    _check_checkpoint,
    _named_net,
    _nearest,
    _normalized,
    _processor_normalization,
    _refuse_config,
    from_checkpoint,
    from_configuration,
    new_configuration,
    read_configuration,
)
from limbeck.models.nets import _kaiming
from limbeck.models.unwrap import LogitsOf, core_network
from limbeck.models.weights import load_weights, refuse_pickle

KINDS = "'hf:<hub id or folder>', 'hf-config:<model type>', a folder that `save_model` wrote"


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, ReLU; the size stays (or halves), whatever the dilation."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1):
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class PyramidHead(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 and some dilated 3x3 convolutions and the picture's mean, side by side,
    then joined by a 1x1 convolution (Chen et al. 2017, section 3.3)."""

    def __init__(self, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        dilated = [ConvBlock(channels, channels, dilation=rate) for rate in rates]
        self.branches = nn.ModuleList([ConvBlock(channels, channels, kernel=1), *dilated])
        # Without BatchNorm: one pixel a sample would leave it no statistics in a batch of one.
        self.whole = nn.Conv2d(channels, channels, 1)
        self.join = ConvBlock((len(rates) + 1) * channels, channels, kernel=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        joined = self.join(torch.cat([branch(x_BCHW) for branch in self.branches], 1))
        return joined + F.relu(self.whole(x_BCHW.mean((2, 3), keepdim=True)))


class MiniDeepLab(nn.Module):
    """A DeepLab in miniature: encoder of stride 4 with a dilated end, pyramid head, logits at the input's size.

    Taps: `encoder.0` (stride 2), `encoder.1` (stride 4), `encoder.2`, ... (dilated by 1, 2, 4, ...), `head` (what the
    classifier reads), `classifier` (logits of stride 4). Any picture size. Raises `UserError` for fewer than three
    widths.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        channels: Sequence[int] = (16, 32, 48, 48),
        rates: Sequence[int] = (2, 4),
    ) -> None:
        super().__init__()
        if len(channels) < 3:
            raise UserError(f"mini_deeplab needs at least 3 widths, got channels={list(channels)}.")
        self.num_classes = num_classes
        self.origin = {
            "name": "mini_deeplab",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "config": {"channels": list(channels), "rates": list(rates)},
        }
        widths = [in_channels, *channels]
        strides = [2, 2] + [1] * (len(channels) - 2)
        dilations = [1, 1] + [2**level for level in range(len(channels) - 2)]
        self.encoder = nn.Sequential(
            *(
                ConvBlock(widths[i], widths[i + 1], stride=strides[i], dilation=dilations[i])
                for i in range(len(channels))
            )
        )
        self.head = PyramidHead(channels[-1], rates)
        self.classifier = nn.Conv2d(channels[-1], num_classes, 1)
        self.apply(_kaiming)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits = self.classifier(self.head(self.encoder(image_BCHW)))
        return F.interpolate(logits, image_BCHW.shape[-2:], mode="bilinear", align_corners=False)


SEGMENTERS: dict[str, Callable[..., nn.Module]] = {"mini_deeplab": MiniDeepLab}


class MaskLogits(LogitsOf):
    """A transformers segmenter (SegFormer and its like) as `image_BCHW -> logits_BCHW` at the input's size."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        logits = self.model(pixel_values=image_BCHW).logits
        return F.interpolate(logits, image_BCHW.shape[-2:], mode="bilinear", align_corners=False)


def load_segmenter(
    name: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    normalize: Normalization | None = None,
    in_channels: int | None = None,
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The segmenter of that name: `image_BCHW in [0, 1] -> logits_BCHW` at the input's height and width.

    `name` is one of

    - a reference net: `mini_deeplab`; `config` holds further arguments of its constructor, `{"channels": [8, 16, 16]}`;
    - `hf:<hub id or folder>`: a transformers semantic segmenter with its weights (safetensors only);
    - `hf-config:<model type>`: the same architecture with random weights, e.g. `hf-config:segformer` with
      `config={"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512]}` (SegFormer-B2);
    - a folder that `save_model` or transformers' `save_pretrained` wrote;
    - an `nn.Module`, taken as it is.

    The other arguments are those of `load_model`; there is no resizing, for a mask must fit its picture.

    Raises `UserError` for an unknown name or configuration key, for pickles, for weights of another architecture, and
    for a head that would be silently random.
    """
    shape = {k: v for k, v in {"num_classes": num_classes, "in_channels": in_channels}.items() if v is not None}
    config = dict(config or {})
    found: Normalization | None = None
    if isinstance(name, nn.Module):
        _refuse_config(type(name).__name__, config)
        model = name
    elif str(name) in SEGMENTERS:
        model = _named_net(str(name), shape, config, SEGMENTERS)
    elif str(name).startswith("hf-config:"):
        model = _from_config(str(name)[10:], shape, config, attn_implementation)
    elif str(name).startswith("hf:") or Path(name).exists():
        _refuse_config(str(name), config)
        source = str(name).removeprefix("hf:")
        model, found = _from_source(source, shape, new_head, attn_implementation, trust_remote_code)
    else:
        raise UserError(f"There is no segmenter '{name}'{_nearest(str(name), SEGMENTERS)}; or give {KINDS}.")
    if weights is not None:
        load_weights(core_network(model), weights)
    return _normalized(model, found if normalize is None else normalize, None)


def require_classes(model: nn.Module, classes: int) -> None:
    """Raise `UserError` where a segmenter states another number of classes than the masks' `classes`."""
    core = core_network(model)
    stated = getattr(getattr(core, "config", None), "num_labels", getattr(core, "num_classes", None))
    if isinstance(stated, int) and stated != classes:
        raise UserError(
            f"The segmenter has {stated} classes and the masks {classes}; build it with num_classes={classes}, or name "
            "the data's classes."
        )


def _from_config(
    model_type: str, shape: dict[str, int], config: dict[str, Any], attn_implementation: str | None
) -> nn.Module:
    from transformers import AutoModelForSemanticSegmentation

    names = {"num_classes": "num_labels", "in_channels": "num_channels"}
    built = new_configuration(model_type, {names[key]: value for key, value in shape.items()}, config)
    _require_segmenter(built)
    return MaskLogits(from_configuration(AutoModelForSemanticSegmentation, built, attn_implementation))


def _from_source(
    source: str, shape: dict[str, int], new_head: bool, attn_implementation: str | None, trust_remote_code: bool
) -> tuple[nn.Module, Normalization | None]:
    """A folder of ours, or a transformers checkpoint from a folder or the hub."""
    described = Path(source) / DESCRIPTION
    saved = json.loads(described.read_text()) if described.exists() else {}
    scale = saved.get("normalize")
    if saved.get("name") in SEGMENTERS:
        refuse_pickle(Path(source))
        for key, value in shape.items():
            if saved.get(key, value) != value:
                raise UserError(f"The segmenter in '{source}' has {key}={saved[key]}, {value} was asked for.")
        saved_shape = {key: saved[key] for key in ("num_classes", "in_channels")}
        model = _named_net(saved["name"], saved_shape, saved["config"], SEGMENTERS)
        load_weights(model, source)
        return model, tuple(scale) if scale else None
    from transformers import AutoModelForSemanticSegmentation

    config = read_configuration(source, trust_remote_code)
    _check_checkpoint(source, config, shape, new_head)
    _require_segmenter(config)
    if "num_classes" in shape:
        config.num_labels = shape["num_classes"]
    model, random = from_checkpoint(
        AutoModelForSemanticSegmentation, source, config, attn_implementation, trust_remote_code, new_head
    )
    if random and not new_head:
        raise UserError(
            f"'{source}' has no weights for {len(random)} parts (first '{random[0]}'), which would be random; "
            "pass new_head=True to fine-tune it."
        )
    return MaskLogits(model), tuple(scale) if scale else _processor_normalization(source)


def _require_segmenter(config: Any) -> None:
    from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING

    if type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING and not getattr(config, "auto_map", None):
        raise UserError(
            f"transformers has no semantic segmenter of type '{config.model_type}'; choose one such as 'segformer'."
        )
