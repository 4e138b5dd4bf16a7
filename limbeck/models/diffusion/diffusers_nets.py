"""Networks of the diffusers library behind the protocol of the small ones.

Shapes: B samples, C channels, H height, W width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.diffusion.denoiser import ImageShape
from limbeck.models.diffusion.schedules import VarianceExploding, VariancePreserving

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
INSTALL = "it needs diffusers, which is not installed: pip install limbeck[diffusion]"


class DiffusersNet(nn.Module):
    """A `UNet2DModel` or `DiTTransformer2DModel` as `net(x_BCHW, time_B, label_B) -> prediction_BCHW`.

    The bottleneck is the U-Net's middle block, or the output of the transformer's middle layer as a map of patches. A
    network that also predicts variances (twice the channels) gives its first half. Raises `UserError` for another
    class, for pictures that the U-Net cannot halve, and for one whose classes have no row for the null label.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        kind, config = type(model).__name__, model.config
        self.model, self.kind = model, kind
        size = config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.image_shape = ImageShape(config.in_channels, height, width)
        if height != width:
            raise UserError(f"the {kind} makes images of {height}x{width}; only square ones are supported")
        if kind == "UNet2DModel":
            channels = config.block_out_channels
            halvings = len(channels) - 1
            if height % 2**halvings:
                raise UserError(
                    f"the UNet2DModel halves pictures {halvings} times, which {height} pixels do not allow; give it "
                    f"fewer blocks, or pictures of a multiple of {2**halvings} pixels"
                )
            self.num_classes = None if config.num_class_embeds is None else config.num_class_embeds - 1
            self.bottleneck, self.bottleneck_shape = "model.mid_block", (channels[-1], height // 2**halvings)
        elif kind == "DiTTransformer2DModel":
            self.num_classes = config.num_embeds_ada_norm
            middle = len(model.transformer_blocks) // 2
            self.bottleneck = f"model.transformer_blocks.{middle}"
            self.bottleneck_shape = (
                config.num_attention_heads * config.attention_head_dim,
                height // config.patch_size,
            )
        else:
            raise UserError(f"there is no denoiser around a {kind}; choose a UNet2DModel or a DiTTransformer2DModel")
        settings = {key: value for key, value in dict(config).items() if not key.startswith("_")}
        self.origin: dict[str, Any] = {
            "name": f"diffusers-config:{kind}",
            "in_channels": config.in_channels,
            "image_size": height,
            "num_classes": self.num_classes,
            "config": json.loads(json.dumps(settings)),
        }

    def forward(self, x_BCHW: Tensor, time_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        out = self.model(x_BCHW, time_B, class_labels=label_B).sample
        return out[:, : x_BCHW.shape[1]]


def from_config(
    kind: str, config: dict[str, Any], in_channels: int, image_size: int, num_classes: int | None
) -> DiffusersNet:
    """A new network with random weights; `config` overrides what the data say and the class's own defaults."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"'diffusers-config:{kind}': {INSTALL}") from error

    known = {"UNet2DModel": "num_class_embeds", "DiTTransformer2DModel": "num_embeds_ada_norm"}
    if kind not in known:
        raise UserError(f"there is no 'diffusers-config:{kind}'; choose {' or '.join(known)}")
    if num_classes is None:
        classes = None if kind == "UNet2DModel" else 1  # a DiT always has classes; one, then
    else:
        # A DiT adds the row of the null label itself.
        classes = num_classes + 1 if kind == "UNet2DModel" else num_classes
    told = {"sample_size": image_size, "in_channels": in_channels, "out_channels": in_channels, known[kind]: classes}
    try:
        return DiffusersNet(getattr(diffusers, kind)(**{**told, **config}))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the configuration of {kind} is refused: {' '.join(str(error).split())[:300]}") from error


def pretrained(source: str) -> tuple[DiffusersNet, dict[str, Any]]:
    """A network with its weights, and `prediction` and `schedule` where a scheduler's file beside it states them.

    `source` is a folder or hub id of a pipeline (with `unet` or `transformer`, and `scheduler`) or of the model alone.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"'diffusers:{source}': {INSTALL}") from error

    folders = ["unet", "transformer", None]
    if Path(source).is_dir():
        folders = [name for name in folders if (Path(source) / (name or "") / "config.json").exists()]
    failure = "it has no config.json, nor a folder unet or transformer with one"
    for folder in folders:
        arguments = {} if folder is None else {"subfolder": folder}
        try:
            model = diffusers.AutoModel.from_pretrained(source, use_safetensors=True, **arguments)
        except (OSError, ValueError) as error:
            failure = " ".join(str(error).split())[:300]
            continue
        return DiffusersNet(model.to(torch.float32)), _stated(source)
    raise UserError(f"'diffusers:{source}' cannot be loaded: {failure}")


def _stated(source: str) -> dict[str, Any]:
    """`prediction` and `schedule` of a pipeline's scheduler; nothing where there is none."""
    from diffusers import DDPMScheduler, EDMEulerScheduler

    try:
        config, _ = DDPMScheduler.load_config(source, subfolder="scheduler", return_unused_kwargs=True)
    except (OSError, ValueError):
        return {}
    if str(config.get("_class_name", "")).startswith("EDM"):
        edm = EDMEulerScheduler.from_config(config).config
        exploding = VarianceExploding(edm.sigma_min, edm.sigma_max, edm.rho)
        return {"prediction": "edm", "schedule": exploding, "sigma_data": edm.sigma_data}
    kinds = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    kind = kinds.get(config.get("beta_schedule", "linear"))
    if kind is None:
        raise UserError(f"'{source}' was trained with the noise schedule '{config['beta_schedule']}', unknown here")
    schedule = VariancePreserving(
        kind,  # type: ignore[arg-type]
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
    )
    return {"prediction": PREDICTIONS[config.get("prediction_type", "epsilon")], "schedule": schedule}
