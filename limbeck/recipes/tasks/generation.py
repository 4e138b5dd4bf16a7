"""Generation: images from noise."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from limbeck.data import Data, Samples, load_data
from limbeck.evaluate.generation import FeatureNet, GenerationEvaluator, as_sampler, real_images, train_feature_net
from limbeck.models.diffusion import load_denoiser
from limbeck.recipes.tasks.task import Evaluator, Task
from limbeck.report.samples import sample_grid

SHOWN = 6  # images of each class in a report
MADE = 1000  # at most, for the metrics; and at most twice as many as there are real ones to compare with


def load_images(
    name_or_path: str,
    *,
    image_size: int | None = None,
    limit: int | Mapping[str, int] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.0,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> Data:
    """Images, with or without classes; the arguments are those of `limbeck.load_data`.

    `image_size` also scales images that come as arrays, such as the digits.

    The splits do not change with `seed`, the run's: a teacher that several runs share, and the network whose features
    the metrics read, must not have been trained on another run's test images.
    """
    return load_data(
        name_or_path,
        image_size=image_size,
        limit=limit,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        image_column=image_column,
        label_column=label_column,
        seed=0,
    )


class Generation(Task):
    """Distances between what a model makes and the test images."""

    name = "generation"
    columns = (
        "frechet", "energy", "coverage", "agreement", "precision", "recall", "parameters", "latency_ms", "seconds",
    )  # fmt: skip
    load_data: ClassVar[Any] = staticmethod(load_images)
    load_model: ClassVar[Any] = staticmethod(load_denoiser)

    def shape(self, data: Data, section: str) -> dict[str, Any]:
        image = data.test.batch(torch.arange(1))["image"]
        classes = {} if data.classes is None else {"num_classes": data.num_classes}
        return {"in_channels": image.shape[1], "image_size": image.shape[-1], **classes}

    def samples(self, data: Data, stream: str) -> Samples:
        return data.train if stream == "images" else super().samples(data, stream)

    def example(self, data: Data, rows: int = 1) -> dict[str, Tensor]:
        """Noise and the class to make."""
        batch = data.test.batch(torch.arange(rows))
        noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(0))
        return {"noise": noise, **({"label": batch["label"]} if "label" in batch else {})}

    def evaluator(self, data: Data) -> Evaluator:
        # Without labels no feature network can be trained: what is left are distances between pixels.
        features = _features(_Key(data.train)) if "label" in data.train.fields else None
        return GenerationEvaluator(features, min(MADE, 2 * len(data.test)))

    def metrics(self, model: nn.Module, data: Data) -> dict[str, float]:
        return super().metrics(as_sampler(model), data)

    def exhibits(self, model: nn.Module, data: Data) -> dict[str, Figure]:
        """Generated and real images, a column a class."""
        sampler, real, classes = as_sampler(model).eval(), data.test, data.classes
        label = None
        if sampler.num_classes is not None:
            label = torch.arange(sampler.num_classes).repeat(SHOWN)
        made = sampler.sample(
            10 * SHOWN if label is None else len(label), torch.Generator().manual_seed(0), label_B=label
        )
        few = real.select(torch.arange(min(len(real), 500)))
        return {
            "Generated": sample_grid(made, label, classes if label is not None else None, SHOWN),
            "Real": sample_grid(real_images(few), few.fields.get("label"), classes, SHOWN),
        }


class _Key:
    """Samples as a key: runs on the same images share one feature network."""

    def __init__(self, samples: Samples) -> None:
        self.samples, images = samples, real_images(samples)
        self.key = (tuple(images.shape), float(images.double().sum()), tuple(samples.labels.tolist()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@lru_cache(maxsize=4)
def _features(key: _Key) -> FeatureNet:
    return train_feature_net(key.samples)


TASK = Generation()
