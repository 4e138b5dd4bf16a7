"""Masks on a teacher's features: what is masked replaces the feature, and the rest of the teacher runs on.

Letters: B samples, D width of a feature (channels), N tokens, H height, W width of a map, E width of a token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.heads import class_count
from limbeck.models.taps import find_module

Kind = Literal["vector", "map", "tokens"]


class MaskNet(nn.Module):
    """A mask m in (0,1)^D from a feature f, by self-attention over its D entries.

        e = Linear(D, E D)(f), reshaped to D tokens of width E;  m = sigmoid(Linear(E, 1)(MultiheadAttention(e, e, e)))

    `vector`: f is [B,D]. `map`: f is [B,D,H,W]; a depthwise 3x3 convolution of stride 2, a 1x1 one (both without
    bias), BatchNorm, ReLU and the mean over positions make a vector of it. `tokens`: f is [B,N,D]; the mean over N.
    Returns m as [B,D], [B,D,1,1] or [B,1,D], to be multiplied with f. A map of a single position is a vector.

    Args:
        width: D.
        heads: of the attention.
        width_factor: E is D / (width_factor * heads) rounded down, times the heads: about D / width_factor.
        rank: None for the full Linear(D, E D), which has about D^3 / width_factor weights (10^8 at D = 596); a number r
            for Linear(D, r) before Linear(r, E D).

    Raises:
        UserError: D is smaller than width_factor * heads, so that no width is left for a token.

    Source: `MaskNet_1d` and `MaskNet_2d` of the official code of MST-Distill; `tokens` and `rank` are ours.
    """

    def __init__(
        self, width: int, *, kind: Kind = "vector", heads: int = 3, width_factor: int = 2, rank: int | None = None
    ) -> None:
        super().__init__()
        token_width = width // (width_factor * heads) * heads
        if token_width < 1:
            raise UserError(
                f"a mask with {heads} heads and width factor {width_factor} needs a feature of at least "
                f"{width_factor * heads} entries, got {width}; lower them or mask a wider layer"
            )
        self.kind = kind
        self.reduce: nn.Module = nn.Identity()
        if kind == "map":
            self.reduce = nn.Sequential(
                nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
        full = width * token_width
        self.embed: nn.Module = (
            nn.Linear(width, full)
            if rank is None
            else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, full))
        )
        self.attention = nn.MultiheadAttention(token_width, heads, batch_first=True)
        self.score = nn.Linear(token_width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        vector_BD = self.reduce(feature.mean(1) if self.kind == "tokens" else feature)
        tokens_BDE = self.embed(vector_BD).unflatten(1, (vector_BD.shape[1], -1))
        attended_BDE = self.attention(tokens_BDE, tokens_BDE, tokens_BDE, need_weights=False)[0]
        mask_BD = self.score(attended_BDE).squeeze(-1).sigmoid()
        if self.kind == "map":
            return mask_BD[:, :, None, None]
        return mask_BD[:, None] if self.kind == "tokens" else mask_BD


def mask_for(feature: Tensor, *, heads: int = 3, width_factor: int = 2, rank: int | None = None) -> MaskNet:
    """A `MaskNet` for features of that shape: [B,D], [B,D,H,W] or [B,N,D].

    Raises `UserError` for another number of dimensions.
    """
    kinds: dict[int, Kind] = {2: "vector", 3: "tokens", 4: "map"}
    if feature.ndim not in kinds:
        raise UserError(
            f"a masked feature is [B,D], [B,N,D] or [B,D,H,W], got {list(feature.shape)}; mask another layer"
        )
    kind = "vector" if feature.shape[2:] == (1, 1) else kinds[feature.ndim]
    width = feature.shape[2] if kind == "tokens" else feature.shape[1]
    return MaskNet(width, kind=kind, heads=heads, width_factor=width_factor, rank=rank)


def apply_mask(mask: nn.Module, feature: Tensor) -> Tensor:
    """mask(f) * f in f's shape; a map of one position [B,D,1,1] is shown to the mask as the vector [B,D]."""
    flat = feature.flatten(1) if feature.shape[2:] == (1, 1) else feature
    return (mask(flat) * flat).reshape(feature.shape)


@contextmanager
def masked(model: nn.Module, layer: str, mask: nn.Module) -> Iterator[None]:
    """While open, and for this thread, the named layer of `model` gives mask(f) * f in the place of f.

    The name is as in `model.named_modules()`, wrappers spelled out or left out. Of a tuple or transformers output the
    first entry is masked. Gradient flows to the mask, to f, and to whatever else requires it. Nothing is left behind
    when it closes. Two of them open on one model at once would both act, which no published system wants: `UserError`.
    """
    module = find_module(model, layer)
    core: Any = model
    if hasattr(core, "_masked_layer"):
        raise UserError(
            f"the layer '{core._masked_layer}' of this model is masked already; one specialised teacher has one mask"
        )
    owner = threading.get_ident()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return output
        return _with_first(output, layer, mask)

    handle = module.register_forward_hook(hook)
    core._masked_layer = layer
    try:
        yield
    finally:
        handle.remove()
        del core._masked_layer


class Masked(nn.Module):
    """`model` with one mask on one of its layers, as a network of its own: a specialised teacher.

    The model is shared, not copied; called by itself it is unmasked as before.
    """

    def __init__(self, model: nn.Module, layer: str, mask: nn.Module) -> None:
        super().__init__()
        find_module(model, layer)
        # The mask first: who looks for the classifier takes the last linear layer.
        self.mask, self.model, self.layer = mask, model, layer
        self.num_classes = class_count(model)

    # A hook that comes and goes does not mix with a traced graph, see `Taps`.
    @torch.compiler.disable
    def forward(self, inputs: Any) -> Any:
        with masked(self.model, self.layer, self.mask):
            return self.model(inputs)


def _with_first(output: Any, layer: str, mask: nn.Module) -> Any:
    if isinstance(output, Tensor):
        return apply_mask(mask, output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (apply_mask(mask, output[0]), *output[1:])
    first = next(iter(output), None) if hasattr(output, "to_tuple") else None
    if first is not None and isinstance(output[first], Tensor):
        changed = type(output)(**output)
        changed[first] = apply_mask(mask, output[first])
        return changed
    raise UserError(f"the masked layer '{layer}' gives a {type(output).__name__} without a tensor in front")
