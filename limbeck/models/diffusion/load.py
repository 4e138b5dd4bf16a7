"""Diffusion models by name: small ones, diffusers' ones, and folders that were saved."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from limbeck.errors import UserError
from limbeck.models.diffusion.denoiser import Denoiser, EDMDenoiser, denoiser_of
from limbeck.models.diffusion.diffusers_nets import from_config, pretrained
from limbeck.models.diffusion.nets import NETS
from limbeck.models.diffusion.samplers import SAMPLERS, Sampler
from limbeck.models.diffusion.schedules import SCHEDULES, FlowMatching, NoiseSchedule, VarianceExploding
from limbeck.models.weights import load_weights

DESCRIPTION = "limbeck.json"
Kind = Literal["edm", "eps", "x0", "v", "flow"]


def load_denoiser(
    name: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    conditional: bool = True,
    prediction: Kind | None = None,
    schedule: Mapping[str, Any] | None = None,
    sigma_data: float | None = None,
    weights: str | Path | None = None,
) -> Denoiser:
    """The diffusion model of that name, as an x0-predictor mu(x_t, t, label).

    `name` is one of `mlp` and `unet` (small ones of ours), `diffusers-config:UNet2DModel` or
    `diffusers-config:DiTTransformer2DModel` with random weights, `diffusers:<folder or hub id>` with its own,
    a folder that `save_model` wrote of a denoiser or sampler, or a denoiser or sampler itself.

    Args:
        num_classes, in_channels, image_size: of a new network. None classes build one without.
        config: further arguments of a new network.
        conditional: False builds a new network without classes whatever `num_classes` says.
        prediction: what the network says: `edm` (Karras's preconditioning; the default), `eps`, `x0`, `v` or `flow`.
            A checkpoint of diffusers states its own.
        schedule: arguments of the noise schedule: of `VarianceExploding` for `edm`, of `FlowMatching` for `flow`, of
            `VariancePreserving` for the others.
        sigma_data: of `edm`; 0.5 by default.
        weights: a safetensors file or folder.

    Raises:
        UserError: there is no such model or argument, or what a folder holds was made otherwise.
    """
    config = dict(config or {})
    stated: dict[str, Any] = {}
    if isinstance(name, nn.Module):
        return denoiser_of(name)
    shape = {"num_classes": num_classes if conditional else None, "in_channels": in_channels, "image_size": image_size}
    if (Path(name) / DESCRIPTION).is_file():
        return denoiser_of(load_sampler(name))
    if str(name) in NETS:
        net = _small(str(name), shape, config)
    elif str(name).startswith("diffusers-config:"):
        net = from_config(str(name).split(":", 1)[1], config, **_sizes(str(name), shape))
    elif str(name).startswith("diffusers:"):
        net, stated = pretrained(str(name).split(":", 1)[1])
    else:
        close = difflib.get_close_matches(str(name), NETS, n=1)
        raise UserError(
            f"there is no diffusion model '{name}'{f' (did you mean {close[0]!r}?)' if close else ''}; choose "
            f"{', '.join(NETS)}, diffusers-config:UNet2DModel, diffusers:<folder or hub id> or a saved folder"
        )
    kind = prediction or stated.get("prediction", "edm")
    # What a checkpoint states of its schedule holds unless another prediction was asked for.
    made = stated.get("schedule") if schedule is None and kind == stated.get("prediction") else None
    made = made or _schedule(kind, dict(schedule or {}))
    denoiser = _denoiser(net, kind, made, sigma_data or stated.get("sigma_data"))
    if weights is not None:
        load_weights(denoiser, weights)
    return denoiser


def load_sampler(folder: str | Path) -> nn.Module:
    """The sampler, or the denoiser, that `limbeck.models.save_model` wrote to a folder."""
    try:
        described = json.loads((Path(folder) / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' is no folder of a saved diffusion model ({error})") from error
    if "sampler" not in described and "prediction" not in described:
        raise UserError(f"the model in '{folder}' is no diffusion model but '{described.get('name')}'; use load_model")
    origin = described.get("denoiser", described)
    model: nn.Module = load_denoiser(**{key: value for key, value in origin.items() if key in _ARGUMENTS})
    if "sampler" in described:
        kind: type[Sampler] = SAMPLERS[described["sampler"]]
        model = kind(model, **described["arguments"])  # type: ignore[arg-type]
    load_weights(model, folder)
    return model


def _small(name: str, shape: dict[str, Any], config: Mapping[str, Any]) -> nn.Module:
    accepted = inspect.signature(NETS[name]).parameters
    for key in config:
        if key not in accepted:
            raise UserError(f"the diffusion model {name} has no argument '{key}'; it has {', '.join(accepted)}")
    return NETS[name](**{**_sizes(name, shape), **config})


def _sizes(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    if shape["in_channels"] is None or shape["image_size"] is None:
        raise UserError(f"the new network '{name}' needs to know its pictures; give in_channels and image_size")
    return shape


def _schedule(kind: str, arguments: dict[str, Any]) -> NoiseSchedule:
    made = SCHEDULES[kind if kind in ("edm", "flow") else "vp"]
    accepted = inspect.signature(made).parameters
    for key in arguments:
        if key not in accepted:
            raise UserError(f"the schedule of '{kind}' models has no argument '{key}'; it has {', '.join(accepted)}")
    return made(**arguments)


def _denoiser(net: nn.Module, kind: str, schedule: NoiseSchedule, sigma_data: float | None) -> Denoiser:
    if kind == "edm":
        assert isinstance(schedule, VarianceExploding)
        return EDMDenoiser(net, 0.5 if sigma_data is None else sigma_data, schedule)
    if sigma_data is not None:
        raise UserError(f"sigma_data belongs to prediction 'edm', but the prediction is '{kind}'; leave it out")
    if kind == "v" and isinstance(schedule, FlowMatching):
        raise UserError("v is a prediction of variance-preserving models; say 'flow'")
    return Denoiser(net, schedule, kind)  # type: ignore[arg-type]


_ARGUMENTS = inspect.signature(load_denoiser).parameters
