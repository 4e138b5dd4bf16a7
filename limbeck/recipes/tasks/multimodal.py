"""Multimodal classification: several modalities while training, one (the target) when the student ships."""

from __future__ import annotations

from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.data.multimodal import MultimodalData, load_multimodal, require_modalities
from limbeck.evaluate import Reliability, reliability
from limbeck.evaluate.multimodal import MultimodalEvaluator, predict_fields
from limbeck.models.multimodal import load_multimodal_model
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report.plots import image_grid

PAIRS = 8  # shown in the report


class Multimodal(Task):
    """Accuracy of a student that reads one modality, or of a network that reads several."""

    name = "multimodal"
    columns = ("accuracy", "nll", "ece", "parameters", "latency_ms", "seconds")
    load_data = staticmethod(load_multimodal)
    load_model = staticmethod(load_multimodal_model)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        paired = cast(MultimodalData, data)
        shapes = {name: tuple(paired.train.fields[name].shape[1:]) for name in paired.modalities}
        return {"num_classes": data.num_classes, "shapes": shapes, "target": paired.target}

    def example(self, data: Data, rows: int = 1) -> Any:
        """The target modality of the first test samples: what ships takes it alone."""
        value = data.test.batch(torch.arange(rows))[cast(MultimodalData, data).target]
        return value.float() / 255 if isinstance(value, Tensor) and value.dtype == torch.uint8 else value

    def evaluator(self, data: Data) -> Evaluator:
        require_modalities(data.test, [cast(MultimodalData, data).target], "which the student reads")
        return MultimodalEvaluator()

    def reliability(self, model: nn.Module, data: Data) -> Reliability:
        return reliability(*predict_fields(model, data.test))

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        paired = cast(MultimodalData, data)
        drawn = [name for name in paired.modalities if _is_picture(data.test, name)]
        if not drawn:
            return {}
        labels = ", ".join(str(data.classes[c]) if data.classes else str(c) for c in data.test.labels[:PAIRS].tolist())
        rows = [pictures(data.test, name, PAIRS) for name in drawn]
        height, width = (max(row.shape[-2] for row in rows), max(row.shape[-1] for row in rows))
        same = torch.cat([nn.functional.interpolate(row, (height, width)) for row in rows])
        return {
            f"Test samples, one column each ({' over '.join(drawn)}); their classes: {labels}": image_grid(same, PAIRS)
        }


def pictures(samples: Samples, modality: str, count: int) -> Tensor:
    """The first samples of a modality as pictures [n,3,H,W] in [0,1]; spectrograms have their low bands below."""
    value = samples.batch(torch.arange(min(count, len(samples))))[modality]
    if value.dtype == torch.uint8:
        images = value.float() / 255
    else:
        low, high = value.amin((1, 2, 3), keepdim=True), value.amax((1, 2, 3), keepdim=True)
        images = ((value - low) / (high - low).clamp(min=1e-6)).flip(2)
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _is_picture(samples: Samples, modality: str) -> bool:
    value = samples.batch(torch.arange(1))[modality]
    return isinstance(value, Tensor) and value.ndim == 4


TASK = Multimodal()
