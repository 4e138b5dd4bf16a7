"""`load_detector`: one call for our detector, transformers', torchvision's, and saved folders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.errors import UserError
from limbeck.models.detection.backbones import CompactBackbone, CompactHead, ResNetC4, StageHead
from limbeck.models.detection.foreign import DEFAULT_SCALE, TorchvisionDetector, TransformersDetector
from limbeck.models.detection.two_stage import C4_SETTINGS, TwoStageDetector, TwoStageSettings
from limbeck.models.load import (
    DESCRIPTION,
    Normalization,
    from_checkpoint,
    from_configuration,
    new_configuration,
    read_configuration,
)
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD
from limbeck.models.unwrap import core_network
from limbeck.models.weights import load_weights, refuse_pickle

OURS = ("compact", "resnet-c4")
SETTINGS = tuple(field.name for field in fields(TwoStageSettings))
KINDS = (
    "'compact', 'resnet-c4', 'hf:<hub id or folder>', 'hf-config:<model type>', 'torchvision:<name>', "
    "'torchvision-config:<name>', a folder"
)


def load_detector(
    name: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    normalize: Normalization | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The detector of that name: pictures [B, C, H, W] in [0, 1] to `Detections`, and the calls of `Detector`.

    `name` is one of

    - `compact`: our two-stage detector with a small backbone; `config` holds `channels`, `width`, `stride`, `norm`
      (`CompactBackbone`), `hidden` (`CompactHead`) and every field of `TwoStageSettings`;
    - `resnet-c4`: the same detector on a ResNet with frozen BatchNorm (ResNet-50 unless `config` overrides
      transformers' `ResNetConfig`), settings as in Faster R-CNN R50-C4;
    - `hf:<hub id or folder>` and `hf-config:<model type>`: an object detector of transformers with its weights, or
      with random ones and `config` over its configuration;
    - `torchvision:<name>` and `torchvision-config:<name>`: likewise, where torchvision is installed;
    - a folder that `limbeck.models.save_model` or transformers' `save_pretrained` wrote;
    - an `nn.Module` with the calls of `Detector`, taken as it is.

    `weights`: safetensors file or folder. `normalize`: as in `load_model`; None is mean 0.5 and std 0.25 for `compact`,
    ImageNet's for the others. `new_head=True` lets a checkpoint of other classes get a random head.

    Raises `UserError` for an unknown name or key, pickles, and weights of another architecture.
    """
    shape = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    asked = {key: value for key, value in shape.items() if value is not None}
    given = dict(config or {})
    if isinstance(name, nn.Module):
        model = _as_it_is(name, given)
    elif str(name) in OURS:
        model = _ours(str(name), asked, given, _scale(normalize))
    elif str(name).startswith("hf-config:"):
        model = _from_config(str(name)[10:], asked, given, _scale(normalize))
    elif str(name).startswith(("torchvision:", "torchvision-config:")):
        model = _torchvision(str(name), asked, given)
    elif str(name).startswith("hf:") or Path(name).is_dir():
        if given:
            raise UserError(f"config={given} describes a new network, but '{name}' is already built; leave it out.")
        source = str(name).removeprefix("hf:")
        model = _from_folder_or_hub(source, asked, _scale(normalize), new_head, trust_remote_code)
    else:
        raise UserError(f"There is no detector '{name}'; give {KINDS}.")
    if weights is not None:
        load_weights(core_network(model), weights)
    return model


def _scale(normalize: Normalization | None) -> tuple[Sequence[float], Sequence[float]] | None:
    if normalize is None or not isinstance(normalize, str):
        return normalize
    if normalize not in ("imagenet", "none"):
        raise UserError(f"normalize is 'imagenet', 'none' or (mean, std), got '{normalize}'.")
    return (IMAGENET_MEAN, IMAGENET_STD) if normalize == "imagenet" else ((0.0,) * 3, (1.0,) * 3)


def _as_it_is(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    missing = [call for call in ("losses", "detect") if not callable(getattr(model, call, None))]
    if missing or config:
        raise UserError(
            f"{type(model).__name__} has no {missing[0]}(), which every detector answers; wrap it as `Detector` says."
            if missing
            else f"config={dict(config)} describes a new network, but {type(model).__name__} is built; leave it out."
        )
    return model


def _ours(
    name: str, asked: Mapping[str, int], config: dict[str, Any], scale: tuple[Any, Any] | None
) -> TwoStageDetector:
    """`asked` holds num_classes; pictures may have any size."""
    classes, channels = _classes(name, asked), asked.get("in_channels", 3)
    own = {key: value for key, value in config.items() if key in SETTINGS}
    rest = {key: value for key, value in config.items() if key not in SETTINGS}
    backbone: Any
    head: nn.Module
    if name == "compact":
        hidden = rest.pop("hidden", 96)
        _refuse_unknown(rest, (*inspect.signature(CompactBackbone).parameters, "hidden"))
        backbone = CompactBackbone(channels, **rest)
        settings, scale = TwoStageSettings(**own), scale or ((0.5,) * channels, (0.25,) * channels)
        head = CompactHead(backbone.channels, settings.bins, hidden, rest.get("norm", "group"))
    else:
        backbone = ResNetC4(channels, **rest)
        head = StageHead(backbone.last_stage.pop(), backbone.last_channels)
        settings, scale = TwoStageSettings(**{**C4_SETTINGS, **own}), scale or DEFAULT_SCALE
    model = TwoStageDetector(backbone, head, num_classes=classes, settings=settings, normalize=scale)
    model.origin = {
        "name": name,
        "num_classes": classes,
        "in_channels": channels,
        "config": config,
        "normalize": [list(part) for part in scale],
    }
    return model


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"The compact detector has no argument '{key}'; it has {', '.join((*known, *SETTINGS))}.")


def _classes(name: str, asked: Mapping[str, int]) -> int:
    if "num_classes" not in asked:
        raise UserError(f"'{name}' is a new detector: say how many classes it tells apart, num_classes=...")
    return asked["num_classes"]


def _from_config(
    kind: str, asked: Mapping[str, int], config: Mapping[str, Any], scale: tuple[Any, Any] | None
) -> nn.Module:
    from transformers import AutoModelForObjectDetection

    renamed = {"num_labels": _classes(f"hf-config:{kind}", asked), "num_channels": asked.get("in_channels", 3)}
    config = dict(config)
    if "backbone_config" not in config:
        config = {**_without_timm(kind), **config}
    elif isinstance(config["backbone_config"], Mapping):
        from transformers import AutoConfig

        inner = dict(config["backbone_config"])
        config["backbone_config"] = AutoConfig.for_model(inner.pop("model_type", "resnet"), **inner)
    built = new_configuration(kind, renamed, config)
    return TransformersDetector(_detection_model(AutoModelForObjectDetection, built), scale or DEFAULT_SCALE)


def _without_timm(kind: str) -> dict[str, Any]:
    """A ResNet of transformers' own, where that type's default backbone is one of timm's."""
    from transformers import CONFIG_MAPPING, ResNetConfig

    known = CONFIG_MAPPING[kind]() if kind in CONFIG_MAPPING else None
    if not hasattr(known, "backbone_config") or not _is_timm(known):
        return {}
    wanted: Any = {"out_features": ["stage2", "stage3", "stage4"][-_levels(known) :]}
    return {"backbone_config": ResNetConfig(**wanted)}


def _is_timm(config: Any) -> bool:
    return getattr(config.backbone_config, "model_type", "") == "timm_backbone"


def _levels(config: Any) -> int:
    """How many maps of the backbone the network reads: one, or several where it attends over scales."""
    return 3 if getattr(config, "num_feature_levels", 1) > 1 else 1


def _detection_model(auto: Any, built: Any) -> nn.Module:
    try:
        return from_configuration(auto, built, None)
    except (ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"transformers cannot build an object detector of '{built.model_type}': {first}") from error


def _from_folder_or_hub(
    source: str, asked: Mapping[str, int], scale: tuple[Any, Any] | None, new_head: bool, trust_remote_code: bool
) -> nn.Module:
    folder = Path(source)
    described = folder / DESCRIPTION
    if described.exists():
        refuse_pickle(folder)
        saved = json.loads(described.read_text())
        if saved.get("name") in OURS:
            if asked.get("num_classes", saved["num_classes"]) != saved["num_classes"]:
                raise UserError(
                    f"The detector in '{folder}' has {saved['num_classes']} classes, {asked['num_classes']} were "
                    "asked for; leave num_classes out, or train a new one."
                )
            model = _ours(saved["name"], saved, saved["config"], scale or tuple(saved["normalize"]))
            load_weights(model, folder)
            return model
    from transformers import AutoModelForObjectDetection

    built = read_configuration(source, trust_remote_code)
    classes = asked.get("num_classes", built.num_labels)
    if classes != built.num_labels and not new_head:
        raise UserError(
            f"'{source}' has {built.num_labels} classes, {classes} were asked for; pass new_head=True to fine-tune it."
        )
    built.num_labels = classes
    auto = AutoModelForObjectDetection
    network, random = from_checkpoint(auto, source, built, None, trust_remote_code, new_head)
    if random and not new_head:
        raise UserError(f"'{source}' has no weights for {len(random)} parts (first '{random[0]}'); pass new_head=True.")
    return TransformersDetector(network, scale or DEFAULT_SCALE)


def _torchvision(name: str, asked: Mapping[str, int], config: Mapping[str, Any]) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise UserError(f"'{name}' needs torchvision, which is not installed: pip install limbeck[timm].") from error
    kind, bare = name.split(":", 1)
    if kind == "torchvision":
        network = get_model(bare, weights="DEFAULT", **config)
        classes = network.roi_heads.box_predictor.cls_score.out_features - 1 if hasattr(network, "roi_heads") else 90
        return TorchvisionDetector(network, classes)
    classes = _classes(name, asked)
    network = get_model(bare, weights=None, weights_backbone=None, num_classes=classes + 1, **config)
    return TorchvisionDetector(network, classes)
