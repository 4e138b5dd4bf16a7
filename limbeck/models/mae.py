"""Masked autoencoders: a vision transformer that sees a few patches, and a decoder that paints the others.

Shapes: B samples, C channels, H height, W width, L patches, K kept patches, P numbers of a patch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, require_share
from limbeck.models.load import from_checkpoint, from_configuration, new_configuration, read_configuration
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize
from limbeck.models.unwrap import LogitsOf


def patchify(image_BCHW: Tensor, size: int) -> Tensor:
    """Square patches in reading order, each as (row, column, channel): [B,C,H,W] to [B,L,P] with P = size^2 C."""
    rows, _, height, width = image_BCHW.shape
    grid = image_BCHW.unflatten(2, (height // size, size)).unflatten(4, (width // size, size))  # B C h p w q
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(rows, (height // size) * (width // size), -1)


def unpatchify(patches_BLP: Tensor, size: int, height: int, width: int) -> Tensor:
    """The picture of these patches: the inverse of `patchify`."""
    grid = patches_BLP.unflatten(1, (height // size, width // size)).unflatten(3, (size, size, -1))  # B h w p q C
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches_BLP), -1, height, width)


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: floor(L (1 - r)), at least one, as the official code of MAE rounds."""
    require_share(mask_ratio=mask_ratio)
    return max(1, int(patches * (1 - mask_ratio)))


def random_masking(noise_BL: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """A mask from noise: the `kept` patches of least noise stay visible.

    Returns `(keep_BK, restore_BL, mask_BL)`: numbers of the kept patches; where each patch stands after the kept ones
    are put first; and 1 where a patch is masked, else 0. Source: He et al. 2022, section 3.
    """
    order_BL = noise_BL.argsort(1)
    restore_BL = order_BL.argsort(1)
    return order_BL[:, :kept], restore_BL, (restore_BL >= kept).float()


def patch_targets(patches_BLP: Tensor, *, normalize: bool) -> Tensor:
    """What the decoder paints: the patches, or with `normalize` (x - mean) / sqrt(unbiased variance + 1e-6) of each."""
    if not normalize:
        return patches_BLP
    variance, mean = torch.var_mean(patches_BLP, dim=-1, keepdim=True)
    return (patches_BLP - mean) * (variance + 1e-6).rsqrt()


def sin_cos_positions(width: int, side: int) -> Tensor:
    """Fixed position embeddings [1, 1 + side^2, D] of a square of patches in reading order; the class token has zeros.

    The first half of a vector tells the column c, the second the row, each as (sin(c w_0), ..., cos(c w_0), ...) with
    w_i = 10000^(-4 i / D). Raises `UserError` where D is no multiple of 4. Source: the official code of MAE.
    """
    if width % 4:
        raise UserError(f"a masked autoencoder's widths are multiples of 4, got {width}; change the config")
    rates_W = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles_SW = torch.arange(side, dtype=torch.float64)[:, None] * rates_W
    line_SH = torch.cat([angles_SW.sin(), angles_SW.cos()], 1)
    column, row = line_SH.repeat(side, 1), line_SH.repeat_interleave(side, 0)
    patches = torch.cat([column, row], 1).float()
    return torch.cat([torch.zeros(1, width), patches])[None]


class MaskedAutoencoder(LogitsOf):
    """A transformers `ViTMAE` whose encoder and decoder are called apart, with a mask from outside.

    `forward(image)` gives the embedding [B,D] of all patches, which is what downstream tasks read.

    Args:
        model: `ViTMAEForPreTraining`.
        pooling: of the encoder's last tokens: `mean` over patches, or the class token `cls`.
        normalize: mean and standard deviation of each channel, for pictures in [0,1]; patches to paint are those of
            the normalised picture.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        normalize: tuple[Any, Any] | None = None,
    ) -> None:
        super().__init__(model)
        self.pooling = pooling
        self.normalize = Normalize(*normalize) if normalize else nn.Identity()

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return int(self.model.config.hidden_size)

    @property
    def depth(self) -> int:
        """How many blocks the encoder has."""
        return len(self.model.vit.layers)

    @property
    def patch_size(self) -> int:
        return int(self.model.config.patch_size)

    @property
    def patches(self) -> int:
        """L, the patches of a picture."""
        return int((self.model.config.image_size // self.patch_size) ** 2)

    def blocks(self, image_BCHW: Tensor, keep_BK: Tensor | None = None, *, last: int | None = None) -> list[Tensor]:
        """What each encoder block gives, [B,1+K,D] raw (before the final norm), class token first.

        Args:
            keep_BK: numbers of the visible patches; None shows all.
            last: the block (from 0) behind which nothing is computed any more.
        """
        tokens = self._embed(image_BCHW, keep_BK)
        outputs = []
        for block in self.model.vit.layers[: None if last is None else last + 1]:
            tokens = block(tokens, None)
            outputs.append(tokens)
        return outputs

    def latent(self, tokens_BND: Tensor) -> Tensor:
        """The last block's tokens after the encoder's final norm, as the decoder reads them."""
        return self.model.vit.layernorm(tokens_BND)

    def decode(self, latent_BND: Tensor, restore_BL: Tensor) -> Tensor:
        """Painted patches [B,L,P] from the latent tokens of the visible ones."""
        return self.model.decoder(latent_BND, restore_BL).logits

    def to_patches(self, image_BCHW: Tensor) -> Tensor:
        """The patches [B,L,P] of the picture as the encoder sees it."""
        return patchify(self.normalize(image_BCHW), self.patch_size)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        tokens = self.latent(self.blocks(image_BCHW)[-1])
        return tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(1)

    def _embed(self, image_BCHW: Tensor, keep_BK: Tensor | None) -> Tensor:
        embeddings = self.model.vit.embeddings
        size = self.model.config.image_size
        if image_BCHW.shape[-2:] != (size, size):
            raise UserError(
                f"the masked autoencoder was built for pictures of {size}x{size}, got {image_BCHW.shape[-2]}x"
                f"{image_BCHW.shape[-1]}; load the data with image_size={size}, or build it with another image_size"
            )
        position_1ND = embeddings.position_embeddings
        tokens = embeddings.patch_embeddings(self.normalize(image_BCHW)) + position_1ND[:, 1:]
        if keep_BK is not None:
            tokens = tokens.gather(1, keep_BK[:, :, None].expand(-1, -1, tokens.shape[-1]))
        first = (embeddings.cls_token + position_1ND[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], 1)


def load_masked_autoencoder(
    name: str | Path | nn.Module,
    *,
    config: Mapping[str, Any] | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    pooling: Literal["mean", "cls"] = "mean",
    normalize: Literal["imagenet", "none"] = "none",
    num_classes: int | None = None,
) -> MaskedAutoencoder:
    """The masked autoencoder of that name.

    Args:
        name: `hf-config:vit_mae`, a new one of the widths in `config` (`{"hidden_size": 192, ...}`, by default ViT-B/16
            with the paper's decoder); `hf:<hub id or folder>`, pretrained (safetensors only); or one, taken as it is.
        pooling: `mean` of the patches or `cls`, what `forward` gives.
        normalize: `imagenet` for checkpoints that were trained so.
        in_channels, image_size: of the data, for a new one.
        num_classes: of the data; a masked autoencoder has none, and so ignores it.

    Raises:
        UserError: an unknown name or key, pictures that patches do not tile, or weights of another architecture.
    """
    if isinstance(name, MaskedAutoencoder):
        return name
    from transformers import ViTMAEForPreTraining

    statistics = (IMAGENET_MEAN, IMAGENET_STD) if normalize == "imagenet" else None
    if str(name) == "hf-config:vit_mae":
        asked = {"num_channels": in_channels, "image_size": image_size}
        asked = {key: value for key, value in asked.items() if value is not None}
        built = new_configuration("vit_mae", asked, config or {})
        if built.image_size % built.patch_size:
            raise UserError(
                f"pictures of {built.image_size} pixels cannot be cut into patches of {built.patch_size}; "
                "change config.patch_size or data.image_size"
            )
        model = _with_positions(from_configuration(_Auto, built, None))
    elif str(name).startswith("hf:"):
        source = str(name).removeprefix("hf:")
        model, missing = from_checkpoint(ViTMAEForPreTraining, source, read_configuration(source, False), None, False)
        if missing:
            raise UserError(f"'{source}' has no weights for {len(missing)} parts (first '{missing[0]}')")
    else:
        raise UserError(f"there is no masked autoencoder '{name}'; give hf-config:vit_mae or hf:<hub id or folder>")
    return MaskedAutoencoder(model, pooling=pooling, normalize=statistics)


def _with_positions(model: Any) -> Any:
    """The new network with the paper's fixed positions: some versions of transformers leave them at zero."""
    side = model.config.image_size // model.config.patch_size
    with torch.no_grad():
        for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            positions.copy_(sin_cos_positions(positions.shape[-1], side)).requires_grad_(False)
        nn.init.normal_(model.decoder.mask_token, std=0.02)
        nn.init.normal_(model.vit.embeddings.cls_token, std=0.02)
    return model


class _Auto:
    """`ViTMAEForPreTraining` under the name by which auto classes build a network."""

    @staticmethod
    def from_config(config: Any, attn_implementation: str | None = None) -> nn.Module:
        from transformers import ViTMAEForPreTraining

        return ViTMAEForPreTraining._from_config(config, attn_implementation=attn_implementation)
