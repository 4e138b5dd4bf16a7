"""Networks that read fields of a batch: one modality, or several that are fused.

They take the batch itself, `{"image": [B,C,H,W], "spectrogram": [B,1,M,T], "present_image": [B], ...}`, and read the
fields of their modalities, so that a teacher and a student of different modalities take the same batch. Pictures are
float in [0,1]. `present_<modality>` bool [B] says which samples have a modality; without it all have.

Letters: B samples, K modalities, D width of an encoder's feature, E width of the fused feature, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.audio import load_audio_model
from limbeck.models.heads import split_head
from limbeck.models.load import DESCRIPTION, Normalization, load_model
from limbeck.models.unwrap import LogitsOf
from limbeck.models.weights import load_weights

Fields = Mapping[str, Any]
Fusion = Literal["concat", "sum", "gated"]


class OneModality(LogitsOf):
    """A network that reads one field of the batch: `fields -> model(fields[modality])`.

    A tensor goes to the network as it is: what ships takes the modality alone, without a batch around it.
    """

    def __init__(self, model: nn.Module, modality: str) -> None:
        super().__init__(model)
        self.modality = modality

    @property
    def modalities(self) -> tuple[str, ...]:
        return (self.modality,)

    def forward(self, inputs: Tensor | Fields) -> Tensor:
        return self.model(inputs if isinstance(inputs, Tensor) else _field(inputs, self.modality))


class ConcatFusion(nn.Module):
    """[f_1; ...; f_K], zeros where a modality is missing; E = sum of the widths."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.out_features = sum(widths)

    def forward(self, features: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([_zero_where_missing(f, p) for f, p in zip(features, present, strict=True)], dim=1)


class SumFusion(nn.Module):
    """Sum over the modalities that are there of W_k f_k + b_k; E = `width`."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.out_features = width
        self.project = nn.ModuleList(nn.Linear(each, width) for each in widths)

    def forward(self, features: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        parts = zip(self.project, features, present, strict=True)
        return torch.stack([_zero_where_missing(project(f), p) for project, f, p in parts]).sum(0)


class GatedFusion(nn.Module):
    """sum_k g_k tanh(W_k f_k + b_k) with g = softmax over the modalities that are there of V [f_1; ...; f_K] + c.

    After the gated multimodal unit (Arevalo et al. 2017, section 3.1), whose gates for two modalities are g and 1 - g.
    A sample that has none gets zeros. E = `width`.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.out_features = width
        self.project = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.gate = nn.Linear(sum(widths), len(widths))

    def forward(self, features: Sequence[Tensor], present: Sequence[Tensor | None]) -> Tensor:
        known = [_zero_where_missing(f, p) for f, p in zip(features, present, strict=True)]
        score_BK = self.gate(torch.cat(known, dim=1))
        there_BK = torch.stack([score_BK.new_ones(len(score_BK)) if p is None else p.to(score_BK) for p in present], 1)
        # A finite stand-in for -inf: a row without any modality must not become NaN.
        gate_BK = score_BK.masked_fill(there_BK == 0, -1e9).softmax(1) * there_BK
        parts = zip(self.project, known, gate_BK.unbind(1), strict=True)
        return torch.stack([gate[:, None] * torch.tanh(project(f)) for project, f, gate in parts]).sum(0)


class MultimodalClassifier(nn.Module):
    """Several encoders, late fusion, and one head: `fields -> logits_BC`.

    Modules to tap or mask: `encoders.<modality>` gives the feature [B,D] of one modality, `fusion` the fused feature
    [B,E], `hidden` what a linear layer with ReLU makes of it [B, hidden], `head` the logits. A missing modality
    contributes nothing whatever its field holds (but its rows count in BatchNorm statistics of its encoder).

    Args:
        encoders: for each modality a network from its field to a feature [B,D], such as `split_head` leaves.
        widths: the D of each.
        num_classes: C.
        fusion: `concat`, `sum` or `gated`, see `ConcatFusion`, `SumFusion`, `GatedFusion`.
        width: E of `sum` and `gated`.
        hidden: width of the hidden layer; None for a head right on the fused feature.

    Raises:
        UserError: there is no encoder, widths name other modalities, or the fusion is unknown.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        widths: Mapping[str, int],
        num_classes: int,
        *,
        fusion: Fusion = "concat",
        width: int = 128,
        hidden: int | None = 128,
    ) -> None:
        super().__init__()
        if not encoders or set(widths) != set(encoders):
            raise UserError(
                f"a multimodal network needs encoders and the width of each, got {', '.join(encoders) or 'none'} and "
                f"widths of {', '.join(widths) or 'none'}"
            )
        self.modalities = tuple(encoders)
        self.num_classes = num_classes
        self.encoders = nn.ModuleDict(encoders)
        sizes = [widths[name] for name in self.modalities]
        self.fusion: ConcatFusion | SumFusion | GatedFusion
        if fusion == "concat":
            self.fusion = ConcatFusion(sizes)
        elif fusion == "sum":
            self.fusion = SumFusion(sizes, width)
        elif fusion == "gated":
            self.fusion = GatedFusion(sizes, width)
        else:
            raise UserError(f"fusion is 'concat', 'sum' or 'gated', got {fusion!r}")
        fused = self.fusion.out_features
        self.hidden: nn.Module = (
            nn.Identity() if hidden is None else nn.Sequential(nn.Linear(fused, hidden), nn.ReLU(inplace=False))
        )
        self.head = nn.Linear(fused if hidden is None else hidden, num_classes)

    def forward(self, fields: Fields) -> Tensor:
        features = [self.encoders[name](_field(fields, name)) for name in self.modalities]
        present = [fields.get(f"present_{name}") for name in self.modalities]
        return self.head(self.hidden(self.fusion(features, present)))


def load_multimodal_model(
    name: str | Path | nn.Module = "small_cnn",
    *,
    modality: str | None = None,
    encoders: Mapping[str, Any] | None = None,
    fusion: Fusion = "concat",
    width: int = 128,
    hidden: int | None = 128,
    config: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    normalize: Normalization | None = None,
    resize: int | None = None,
    num_classes: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    target: str | None = None,
) -> nn.Module:
    """A network on the batch: one modality's (`OneModality`), or with `encoders` a `MultimodalClassifier`.

    Args:
        name: of one modality's network what `load_model` takes, or a spectrogram classifier of transformers from its
            configuration (`hf-config:audio-spectrogram-transformer`); a folder that `save_model` wrote of either kind.
        modality: which one it reads; by default the data's target.
        encoders: for each modality a name, or `name`, `config`, `weights`, `normalize`, `resize` of its network, whose
            classifier is taken off.
        fusion, width, hidden: of the `MultimodalClassifier`.
        config, weights, normalize, resize: of one modality's network, as in `load_model`; `weights` may be the
            multimodal network's.
        num_classes, shapes, target: what new networks must know of the data: classes, the shape of each modality's
            sample, and the student's modality.

    Raises:
        UserError: a modality that the data do not have, no modality at all, or what `load_model` refuses.
    """
    if isinstance(name, nn.Module):
        return name if hasattr(name, "modalities") else OneModality(name, _known(modality or target, shapes))
    if encoders is None and (Path(name) / DESCRIPTION).is_file():
        description = json.loads((Path(name) / DESCRIPTION).read_text())
        if description.pop("name") == "multimodal":
            description.pop("normalize", None), description.pop("resize", None)
            return load_multimodal_model(**description, weights=name)
    if encoders is None:
        spec = {"name": name, "config": config, "weights": weights, "normalize": normalize, "resize": resize}
        modality = _known(modality or target, shapes)
        return OneModality(_network(spec, (shapes or {}).get(modality), num_classes), modality)
    specs = {m: {"name": spec} if isinstance(spec, str) else dict(spec) for m, spec in encoders.items()}
    networks = {m: _network(spec, (shapes or {}).get(_known(m, shapes)), num_classes) for m, spec in specs.items()}
    split = {m: split_head(network) for m, network in networks.items()}
    classes = num_classes or next(iter(split.values()))[1].out_features
    model = MultimodalClassifier(
        {m: backbone for m, (backbone, _) in split.items()},
        {m: head.in_features for m, (_, head) in split.items()},
        classes,
        fusion=fusion,
        width=width,
        hidden=hidden,
    )
    described = {"fusion": fusion, "width": width, "hidden": hidden, "num_classes": classes}
    sizes = {m: list(shape) for m, shape in (shapes or {}).items()}
    # What `load_multimodal_model` needs to build it again; the weights are then the whole network's.
    bare = {m: {k: v for k, v in spec.items() if k != "weights"} for m, spec in specs.items()}
    model.origin = {"name": "multimodal", "encoders": bare, **described, "shapes": sizes}  # type: ignore[assignment]
    if weights is not None:
        load_weights(model, weights)
    return model


def _network(spec: Mapping[str, Any], shape: Sequence[int] | None, num_classes: int | None) -> nn.Module:
    """One modality's classifier; `shape` [C,H,W] of its samples."""
    given = {key: value for key, value in spec.items() if value is not None}
    name = given.pop("name")
    known: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if str(name).startswith("hf-config:") and (
            audio := _spectrogram_classifier(str(name)[10:], given, shape, known)
        ):
            return audio
        if shape is not None and not str(name).startswith(("hf:", "timm:")) and not Path(str(name)).exists():
            known |= {"in_channels": shape[0], "image_size": shape[-1]}
        return load_model(name, **{**known, **given})
    except TypeError as error:
        raise UserError(f"the network {name!r} does not fit load_model: {error}") from None


def _spectrogram_classifier(
    model_type: str, given: Mapping[str, Any], shape: Sequence[int] | None, known: Mapping[str, Any]
) -> nn.Module | None:
    """A transformers audio classifier of spectrograms with random weights; None for types that are none."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING

    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING:
        return None
    default = CONFIG_MAPPING[model_type]()
    if not hasattr(default, "num_mel_bins") or not hasattr(default, "max_length"):
        return None  # it reads waveforms
    sizes: dict[str, Any] = {} if shape is None else {"n_mels": shape[-2], "n_frames": shape[-1]}
    return load_audio_model(f"hf-config:{model_type}", **sizes, **known, **given)


def _known(modality: str | None, shapes: Mapping[str, Sequence[int]] | None) -> str:
    if modality is None:
        raise UserError("a network of one modality must say which: give modality=, e.g. modality='image'")
    if shapes is not None and modality not in shapes:
        raise UserError(f"the data have no modality '{modality}'; they have {', '.join(shapes)}")
    return modality


def _field(fields: Fields, modality: str) -> Any:
    if modality not in fields:
        raise UserError(f"the batch has no modality '{modality}' for the network to read, only {', '.join(fields)}")
    return fields[modality]


def _zero_where_missing(feature_BD: Tensor, present_B: Tensor | None) -> Tensor:
    # where, and not a product: a NaN in a missing modality must not get through.
    return feature_BD if present_B is None else torch.where(present_B.bool()[:, None], feature_BD, 0.0)
