"""`load_model`: one call for reference nets, transformers, timm, saved folders and modules; and its `save_model`."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.nets import NETS
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalized
from limbeck.models.unwrap import LogitsOf, core_network, layers_of_wrapping
from limbeck.models.weights import load_weights, refuse_pickle, save_weights

Normalization = Literal["imagenet", "none"] | tuple[Sequence[float], Sequence[float]]

DESCRIPTION = "limbeck.json"
KINDS = "'hf:<hub id or folder>', 'hf-config:<model type>', 'timm:<name>', 'timm-config:<name>', a folder"


class ImageLogits(LogitsOf):
    """A transformers image classifier as `image_BCHW -> logits_BC`."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=image_BCHW).logits


class TextLogits(LogitsOf):
    """A transformers sequence classifier as `{"input_ids": .., "attention_mask": ..} -> logits_BC`."""

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        return self.model(**tokens).logits


def load_model(
    name: str | Path | nn.Module,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    normalize: Normalization | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    config: Mapping[str, Any] | None = None,
    new_head: bool = False,
    resize: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of that name: `image_BCHW in [0, 1] -> logits_BC`, or token dict -> `logits_BC`.

    `name` is one of

    - a reference net (`limbeck.models.NETS`): `resnet20`, `small_cnn`, ...; `config` holds further arguments of
      its constructor, `{"channels": [16, 32]}`;
    - `hf:<hub id or folder>`: a transformers image or sequence classifier with its weights (safetensors only);
    - `hf-config:<model type>`: the same architecture with random weights, `config` overrides its configuration:
      `load_model("hf-config:resnet", config={"depths": [1, 1]}, num_classes=10)`;
    - `timm:<name>` and `timm-config:<name>`: likewise with and without pretrained weights, when timm is installed;
    - a folder that `save_model` or transformers' `save_pretrained` wrote;
    - an `nn.Module`, taken as it is.

    `weights`: safetensors file, or a folder that holds `model.safetensors`, loaded into the network.
    `normalize`: `"imagenet"`, `"none"` or `(mean, std)`; None takes what the folder or the checkpoint's image
    processor says, else nothing. `resize`: pictures of another size are first resized to this one.
    `num_classes`, `in_channels`, `image_size` describe a new network; networks that take any picture size ignore
    `image_size`. Of a checkpoint with another number of classes, `new_head=True` makes a random head of
    `num_classes` for fine-tuning. `attn_implementation="eager"` makes transformers give attention weights.
    `trust_remote_code=True` lets a hub checkpoint run its own code.

    Raises `UserError` for an unknown name or configuration key (with the nearest one), for pickle files, for
    weights of another architecture, and for a head that would be silently random.
    """
    # What the network sees is what the pictures are resized to.
    asked = {"num_classes": num_classes, "in_channels": in_channels, "image_size": resize or image_size}
    shape = {key: value for key, value in asked.items() if value is not None}
    config = dict(config or {})
    if str(name).startswith("hf:") and (Path(str(name)[3:]) / DESCRIPTION).exists():
        # A folder of ours: its description knows the normalisation, which transformers' files do not.
        name = Path(str(name)[3:])
    found: Normalization | None = None
    if isinstance(name, nn.Module):
        _refuse_config(type(name).__name__, config)
        model = name
    elif str(name) in NETS:
        model = _named_net(str(name), shape, config)
    elif str(name).startswith("hf:"):
        _refuse_config(str(name), config)
        model, found = _pretrained(str(name)[3:], shape, new_head, attn_implementation, trust_remote_code)
    elif str(name).startswith("hf-config:"):
        model = _from_config(str(name)[10:], shape, config, attn_implementation)
    elif str(name).startswith(("timm:", "timm-config:")):
        model, found = _timm(str(name), shape, config, new_head)
    elif Path(name).exists():
        _refuse_config(str(name), config)
        model, found, saved_resize = _from_folder(Path(name), shape, new_head, attn_implementation, trust_remote_code)
        resize = resize or saved_resize
    else:
        raise UserError(f"There is no model '{name}'{_nearest(str(name), NETS)}; or give {KINDS}.")
    if weights is not None:
        load_weights(core_network(model), weights)
    return _normalized(model, found if normalize is None else normalize, resize)


def save_model(model: nn.Module, folder: str | Path) -> Path:
    """Writes `model.safetensors` and, when the architecture is known, `limbeck.json`; returns the folder.

    `load_model(folder)` builds the same model again, its normalisation included. Wrappers (DDP, compiled,
    `Normalized`) are looked through: the keys are the network's own. A network that Limbeck cannot name (your own
    class, a split head) is saved as weights alone, for `load_model(my_module, weights=folder)`. The weights'
    file appears whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    core = core_network(model)
    origin = getattr(core, "origin", None)
    if origin == {"name": "transformers"}:
        _save_transformers(core, folder)
    else:
        save_weights(core, folder / "model.safetensors")
    if origin is not None:
        description = {**origin, **_normalization_of(model)}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def _save_transformers(core: Any, folder: Path) -> None:
    """transformers' own files, so that its `from_pretrained` reads the folder too; moved in when complete."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        with _without_progress_bar():
            core.save_pretrained(unfinished)
        for file in sorted(Path(unfinished).iterdir()):
            os.replace(file, folder / file.name)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Of transformers, which shows one for every file that it reads or writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _normalization_of(model: nn.Module) -> dict[str, Any]:
    for layer in layers_of_wrapping(model):
        if isinstance(layer, Normalized):
            scale = [layer.normalize.mean.flatten().tolist(), layer.normalize.std.flatten().tolist()]
            return {"normalize": scale, "resize": getattr(layer.resize, "size", None)}
    return {}


def _normalized(model: nn.Module, normalize: Normalization | None, resize: int | None) -> nn.Module:
    if normalize is None or isinstance(normalize, str) and normalize == "none":
        if resize is not None:
            raise UserError("resize goes with a normalisation; pass normalize='imagenet' or (mean, std) too.")
        return model
    if isinstance(normalize, str):
        if normalize != "imagenet":
            raise UserError(f"normalize is 'imagenet', 'none' or (mean, std), got '{normalize}'.")
        normalize = (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = normalize
    return Normalized(model, mean, std, resize)


def _named_net(name: str, shape: dict[str, int], config: dict[str, Any], nets: Mapping[str, Any] = NETS) -> nn.Module:
    accepted = inspect.signature(nets[name]).parameters
    for key in config:
        if key not in accepted:
            raise UserError(f"{name} has no argument '{key}'{_nearest(key, accepted)}.")
    shape = {key: value for key, value in shape.items() if key in accepted}
    return nets[name](**{**shape, **config})


def _from_config(
    model_type: str, shape: dict[str, int], config: dict[str, Any], attn_implementation: str | None
) -> nn.Module:
    asked = {_TRANSFORMERS_NAME[key]: value for key, value in shape.items()}
    built = new_configuration(model_type, asked, config)
    auto, wrapper = _task_of(built)
    return wrapper(from_configuration(auto, built, attn_implementation))


_TRANSFORMERS_NAME = {"num_classes": "num_labels", "in_channels": "num_channels", "image_size": "image_size"}


def new_configuration(model_type: str, asked: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The configuration of that transformers type with what the data ask for, where the type has it, and `config`.

    Raises `UserError` for an unknown type or key of `config` (with the nearest one), and for refused values.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if model_type not in CONFIG_MAPPING:
        raise UserError(f"transformers has no model type '{model_type}'{_nearest(model_type, CONFIG_MAPPING)}.")
    default = AutoConfig.for_model(model_type)
    for key in config:
        if not hasattr(default, key):
            raise UserError(f"The configuration of '{model_type}' has no '{key}'{_nearest(key, default.to_dict())}.")
    # What `config` sets under the type's own name (gpt2's n_positions) must not be asked for by the general one too.
    own_name = default.attribute_map
    asked = {key: value for key, value in asked.items() if own_name.get(key) not in config}
    asked = {key: value for key, value in asked.items() if key == "num_labels" or hasattr(default, key)}
    try:
        return AutoConfig.for_model(model_type, **{**asked, **config})
    except (TypeError, ValueError) as error:
        raise UserError(f"The configuration of '{model_type}' is refused: {_one_line(error)}.") from error


def from_configuration(auto: Any, built: Any, attn_implementation: str | None) -> nn.Module:
    """The network of a transformers auto class and configuration, with random weights."""
    model = auto.from_config(built, attn_implementation=attn_implementation)
    model.origin = {"name": "transformers"}
    return model


def _pretrained(
    source: str,
    shape: dict[str, int],
    new_head: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, Normalization | None]:
    config = read_configuration(source, trust_remote_code)
    _check_checkpoint(source, config, shape, new_head)
    if "num_classes" in shape:
        config.num_labels = shape["num_classes"]
    auto, wrapper = _task_of(config)
    model, random = from_checkpoint(auto, source, config, attn_implementation, trust_remote_code, new_head)
    if random and not new_head:
        raise UserError(
            f"'{source}' has no weights for {len(random)} parts (first '{random[0]}'), which would be random; "
            "pass new_head=True to fine-tune it, or choose a checkpoint with a trained classifier."
        )
    return wrapper(model), _processor_normalization(source)


def read_configuration(source: str, trust_remote_code: bool) -> Any:
    """The transformers configuration of a hub id or folder. Raises `UserError` where there is none, or a pickle."""
    from transformers import AutoConfig

    if Path(source).is_dir():
        refuse_pickle(Path(source))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"'{source}' has no transformers configuration to load: {_one_line(error)}.") from error


def from_checkpoint(
    auto: Any,
    source: str,
    config: Any,
    attn_implementation: str | None,
    trust_remote_code: bool,
    new_head: bool = False,
) -> tuple[nn.Module, list[str]]:
    """The network of a transformers auto class with that checkpoint's weights in float32 (safetensors only), and the
    names of the parts that it has no weights for. `new_head` lets parts of another shape be random too."""
    try:
        with _without_progress_bar():
            model, info = auto.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                dtype=torch.float32,
            )
    except OSError as error:
        raise UserError(f"'{source}' has no safetensors weights to load: {_one_line(error)}.") from error
    model.origin = {"name": "transformers"}
    return model, sorted(info["missing_keys"])


def _check_checkpoint(source: str, config: Any, shape: dict[str, int], new_head: bool) -> None:
    """At the door: what the caller's data need against what the checkpoint was made for."""
    asked = shape.get("num_classes", config.num_labels)
    if asked != config.num_labels and not new_head:
        raise UserError(
            f"'{source}' has {config.num_labels} classes, {asked} were asked for; choose a checkpoint with {asked} "
            "classes, or pass new_head=True to fine-tune it with a random head."
        )
    channels = getattr(config, "num_channels", None)
    if channels is not None and shape.get("in_channels", channels) != channels:
        raise UserError(
            f"'{source}' takes pictures of {channels} channels, {shape['in_channels']} were asked for; repeat or "
            "average the channels of the data."
        )
    size = getattr(config, "image_size", None)
    if isinstance(size, int) and shape.get("image_size", size) != size:
        raise UserError(
            f"'{source}' takes pictures of {size}x{size}, {shape['image_size']} was asked for; pass resize={size}."
        )


def _task_of(config: Any) -> tuple[Any, type[LogitsOf]]:
    """The transformers auto class for that configuration, and our wrapper: of pictures or of text."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    image = (AutoModelForImageClassification, ImageLogits)
    text = (AutoModelForSequenceClassification, TextLogits)
    said = " ".join([*(config.architectures or []), *(getattr(config, "auto_map", None) or {})])
    if "ForImageClassification" in said:
        return image
    if "ForSequenceClassification" in said:
        return text
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return image
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return text
    raise UserError(
        f"transformers has no image or sequence classifier of type '{config.model_type}'; build the model yourself "
        "and pass it as an nn.Module."
    )


def _processor_normalization(source: str) -> Normalization | None:
    """Mean and std that the checkpoint's image processor states. (The file is read, for the processor's own class
    may need torchvision.)"""
    from transformers import ImageProcessingMixin

    try:
        stated, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return None
    if not stated.get("do_normalize", True) or "image_mean" not in stated:
        return None
    return stated["image_mean"], stated["image_std"]


def _timm(
    name: str, shape: dict[str, int], config: dict[str, Any], new_head: bool
) -> tuple[nn.Module, Normalization | None]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"'{name}' needs timm, which is not installed: pip install limbeck[timm].") from error

    kind, bare = name.split(":", 1)
    if not timm.is_model(bare):
        raise UserError(f"timm has no model '{bare}'{_nearest(bare, timm.list_models())}.")
    # timm adapts the first convolution and the head of a pretrained network itself.
    renamed = {"num_classes": "num_classes", "in_channels": "in_chans"}
    asked = {renamed[key]: value for key, value in shape.items() if key in renamed}
    model = timm.create_model(bare, pretrained=kind == "timm", **{**asked, **config})
    trained = model.pretrained_cfg["num_classes"]
    if kind == "timm" and model.num_classes != trained and not new_head:
        raise UserError(
            f"'{name}' has {trained} classes, {model.num_classes} were asked for; pass new_head=True to fine-tune "
            "it with a random head."
        )
    return model, (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


def _from_folder(
    path: Path,
    shape: dict[str, int],
    new_head: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, Normalization | None, int | None]:
    refuse_pickle(path)
    described = path / DESCRIPTION
    saved = json.loads(described.read_text()) if described.exists() else {}
    scale, resize = saved.get("normalize"), saved.get("resize")
    if (path / "config.json").exists():
        shape = {**shape, "image_size": resize} if resize else shape
        model, found = _pretrained(str(path), shape, new_head, attn_implementation, trust_remote_code)
        return model, tuple(scale) if scale else found, resize
    if saved.get("name") not in NETS:
        raise UserError(
            f"'{path}' is not a folder with {DESCRIPTION} or config.json, so its architecture is unknown; name the "
            f"architecture and pass weights='{path}'."
        )
    for key, value in shape.items():
        if saved.get(key, value) != value:
            raise UserError(f"The model in '{path}' has {key}={saved[key]}, {value} was asked for; leave it out.")
    saved_shape = {key: saved[key] for key in ("num_classes", "in_channels", "image_size") if key in saved}
    model = _named_net(saved["name"], saved_shape, saved.get("config", {}))
    load_weights(model, path)
    return model, tuple(scale) if scale else None, resize


def _refuse_config(name: str, config: dict[str, Any]) -> None:
    if config:
        raise UserError(f"config={config} describes a new network, but '{name}' is already built; leave it out.")


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(list(known)[:12])}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
