"""Trunks and region heads of the two-stage detector: a small one for tests and small data, and ResNet-C4.

Shapes: B images, C channels, H and W of a picture, N regions, P bins of a region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError

Norm = Literal["group", "frozen"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always normalises by its running statistics and whose weights do not train.

    Detection batches are too small for statistics of their own; its keys are BatchNorm's.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in eval mode."""
        return super().train(False)


def freeze_batchnorm(module: nn.Module) -> nn.Module:
    """Every BatchNorm2d inside `module` as `FrozenBatchNorm2d` with its weights and statistics, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_batchnorm(child)
    return module


def _conv(in_channels: int, out_channels: int, norm: Norm, stride: int = 1, size: int = 3) -> nn.Sequential:
    made = nn.GroupNorm(_groups(out_channels), out_channels) if norm == "group" else FrozenBatchNorm2d(out_channels)
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, made)


def _groups(channels: int) -> int:
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first one has the stride."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, stride: int = 1) -> None:
        super().__init__()
        self.first = _conv(in_channels, out_channels, norm, stride)
        self.second = _conv(out_channels, out_channels, norm)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else _conv(in_channels, out_channels, norm, stride, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x_BCHW))) + self.shortcut(x_BCHW))


class CompactBackbone(nn.Module):
    """Stages of strides 2, 4, 8, ..., merged from the coarsest down to one map of `stride` and `width` channels.

    image [B, C, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]. `channels` are those of the stages; the first
    is one convolution, the others are residual blocks. Coarser stages than `stride` are added to it by 1x1 convolutions
    and nearest-neighbour upsampling, as in a feature pyramid (Lin et al. 2017) of which only one level is used.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (16, 32, 48, 64),
        width: int = 48,
        stride: int = 4,
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        strides = [2 ** (stage + 1) for stage in range(len(channels))]
        if stride not in strides:
            raise UserError(f"stride is {stride}, but a backbone of {len(channels)} stages has {strides}.")
        self.stride, self.channels = stride, width
        self.stem = _conv(in_channels, channels[0], norm, 2)
        pairs = zip(channels[:-1], channels[1:], strict=True)
        self.stages = nn.ModuleList(Residual(before, after, norm, 2) for before, after in pairs)
        self.first = strides.index(stride)
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels[self.first :])
        self.smooth = _conv(width, width, norm)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [F.relu(self.stem(x_BCHW))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        levels = [lateral(level) for lateral, level in zip(self.lateral, maps[self.first :], strict=True)]
        merged = levels.pop()
        for level in reversed(levels):
            merged = level + F.interpolate(merged, level.shape[-2:])
        return F.relu(self.smooth(merged))


class CompactHead(nn.Module):
    """Pooled regions [N, C, P, P] to features [N, hidden]: a convolution of stride 2, then a linear layer on it all.

    Unlike the mean over places of the C4 form it knows where in the region something lies, which two layers that were
    never pretrained need for the box deltas.
    """

    def __init__(self, in_channels: int, bins: int, hidden: int = 96, norm: Norm = "group") -> None:
        super().__init__()
        self.channels = hidden
        self.conv = _conv(in_channels, in_channels, norm, 2)
        self.linear = nn.Linear(in_channels * ((bins + 1) // 2) ** 2, hidden)

    def forward(self, regions_NCPP: Tensor) -> Tensor:
        return F.relu(self.linear(F.relu(self.conv(regions_NCPP)).flatten(1)))


class ResNetC4(nn.Module):
    """A ResNet up to its fourth stage, stride 16, with frozen BatchNorm; `head` is its fifth stage and the mean.

    The network is transformers' (`config` overrides its configuration; the default is ResNet-50), so `weights` may be
    any of its ResNet checkpoints' safetensors. Faster R-CNN's C4 form, which LPLD and PS-TTL use.
    """

    def __init__(self, in_channels: int = 3, **config: Any) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        built = ResNetConfig(num_channels=in_channels, **config)
        network: Any = freeze_batchnorm(ResNetModel(built))
        stages = list(network.encoder.stages)
        if len(stages) != 4:
            raise UserError(f"A C4 detector needs a ResNet of 4 stages, got depths={built.depths}.")
        self.embedder: nn.Module = network.embedder
        self.stages = nn.ModuleList(stages[:3])
        widths: Any = built.hidden_sizes
        self.channels, self.stride = widths[2], 16
        self.last_stage, self.last_channels = [stages[3]], widths[3]  # a list: it belongs to the head

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.embedder(x_BCHW)
        for stage in self.stages:
            x = stage(x)
        return x


class StageHead(nn.Module):
    """Pooled regions [N, C, P, P] through the last stage of a ResNet to features [N, D]."""

    def __init__(self, stage: nn.Module, channels: int) -> None:
        super().__init__()
        self.stage, self.channels = stage, channels

    def forward(self, regions_NCPP: Tensor) -> Tensor:
        return self.stage(regions_NCPP).mean((2, 3))
