"""Small reference networks, readable and exact; `NETS` maps the names that `load_model` knows to them.

Shapes: B samples, C channels (or classes), H height, W width, N tokens, D width, P heads.
Every network maps `image_BCHW` (normalised or in [0, 1]) to `logits_BC`. `origin` on each network is what
`load_model` needs to build it again; `save_model` writes it beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.audio_ntt import AudioNTT


def _kaiming(module: nn.Module) -> None:
    """He et al. 2015, equation 10: normal weights of variance 2 / fan_in, zero biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self._shortcut(x_BCHW))

    def _shortcut(self, x_BCHW: Tensor) -> Tensor:
        if self.stride == 1 and self.new_channels == 0:
            return x_BCHW
        # The new channels are zeros, half of them before and half behind the old ones.
        before = self.new_channels // 2
        subsampled = x_BCHW[:, :, :: self.stride, :: self.stride]
        return F.pad(subsampled, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """ResNet for small pictures (He et al. 2016, section 4.2): depth 6n+2, 16-32-64 channels, option A.

    State-dict keys: `conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear`. Takes any picture size from
    8x8. Raises `UserError` when `depth` is not 6n+2.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"A CIFAR ResNet has depth 6n+2 (20, 32, 44, 56, 110), got {depth}.")
        blocks = (depth - 2) // 6
        self.origin = {"name": f"resnet{depth}", "num_classes": num_classes, "in_channels": in_channels}
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        self.apply(_kaiming)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(image_BCHW)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


class SmallCnn(nn.Module):
    """3x3 convolution, BatchNorm and ReLU a stage, halved between stages, pooled, one linear `head`.

    One stage a number in `channels`; a picture needs at least `2 ** (stages - 1)` pixels a side, so the default
    takes 8x8 to 32x32 and more. Stages are named `stages.{i}`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if not channels:
            raise UserError("small_cnn needs at least one number in channels, got none.")
        self.origin = {
            "name": "small_cnn",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "config": {"channels": list(channels)},
        }
        widths = [in_channels, *channels]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.head = nn.Linear(channels[-1], num_classes)
        self.apply(_kaiming)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        out = self.stages[0](image_BCHW)
        for stage in self.stages[1:]:
            out = stage(F.max_pool2d(out, 2))
        return self.head(out.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention. Its child `softmax` gives the attention weights [B, P, N, N] to a tap."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(dim=-1)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        batch, tokens, width = x_BND.shape
        qkv = self.qkv(x_BND).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights_BPNN = self.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
        return self.out((weights_BPNN @ v).transpose(1, 2).reshape(batch, tokens, width))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP, each added to its input."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class SmallViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) for small pictures: class token, learned positions, pre-norm.

    `image_size` must be a multiple of `patch_size`, and `width` of `heads` (`UserError` otherwise). Blocks are
    named `blocks.{i}` and give [B, 1 + patches, width]; attention weights are at `blocks.{i}.attention.softmax`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: int = 2,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}; change one.")
        if width % heads:
            raise UserError(f"width {width} is not a multiple of heads {heads}; change one.")
        shape = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
        self.origin = {
            "name": "small_vit",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "config": shape,
        }
        self.image_size = image_size
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        self.apply(_truncated_normal)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if image_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"small_vit was built for pictures of {self.image_size}x{self.image_size}, got "
                f"{image_BCHW.shape[-2]}x{image_BCHW.shape[-1]}; pass image_size=."
            )
        x_BND = self.patches(image_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.class_token.expand(x_BND.shape[0], -1, -1), x_BND], dim=1) + self.positions
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.head(self.norm(x_BND)[:, 0])


def _truncated_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Mlp(nn.Module):
    """Flattened input, `hidden` layers with ReLU and dropout, one linear `head`.

    Takes `image_BCHW` of `image_size`, or rows [B, F] of a table with `in_channels=F, image_size=1`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.origin = {
            "name": "mlp",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "config": {"hidden": list(hidden), "dropout": dropout},
        }
        widths = [in_channels * image_size**2, *hidden]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.head = nn.Linear(widths[-1], num_classes)
        self.apply(_kaiming)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        out = image_BCHW.flatten(1)
        for layer in self.layers:
            out = layer(out)
        return self.head(out)


resnet20 = partial(CifarResNet, 20)
resnet32 = partial(CifarResNet, 32)
resnet44 = partial(CifarResNet, 44)
resnet56 = partial(CifarResNet, 56)
resnet110 = partial(CifarResNet, 110)

NETS: dict[str, Callable[..., nn.Module]] = {
    "audio_ntt": AudioNTT,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "small_cnn": SmallCnn,
    "small_vit": SmallViT,
    "mlp": Mlp,
}
