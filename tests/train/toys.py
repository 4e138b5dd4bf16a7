"""Small samples, networks and methods that the tests of the loop share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples, Stream
from limbeck.train import Batch, Losses, Method, Optimizer, Trainer

CLASSES = 4


def pictures(n: int = 24, seed: int = 0, *, labelled: bool = True) -> Samples:
    """uint8 pictures [n, 3, 8, 8] and their labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Samples({"image": image, "label": torch.arange(n) % CLASSES} if labelled else {"image": image})


class Noisy:
    """A view that draws from the global generator."""

    def __call__(self, images: Tensor) -> Tensor:
        return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


class Still:
    """A view without randomness."""

    def __call__(self, images: Tensor) -> Tensor:
        return images


def stream(samples: Samples | None = None, batch_size: int = 4, view: type = Still, **options: bool) -> Stream:
    return Stream(samples or pictures(), batch_size, {"weak": view(), "strong": view()}, **options)


def streams(batch_size: int = 4, view: type = Still) -> dict[str, Stream]:
    return {"labelled": stream(batch_size=batch_size, view=view)}


def two_streams(batch_size: int = 4, view: type = Still) -> dict[str, Stream]:
    return {
        "labelled": stream(pictures(12), batch_size, view),
        "unlabelled": stream(pictures(24, seed=1, labelled=False), 2 * batch_size, view),
    }


def plain_net(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """Neither BatchNorm nor dropout: what it computes for a sample does not depend on the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes))


def norm_net(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(24, CLASSES),
    )


class Classify(Method):
    """Cross-entropy on the labels, and the squared size of the logits as a second term."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.weights = {"size": 0.0}

    def training_step(self, batch: Batch) -> Losses:
        logits_BC = self.student(batch["labelled"]["weak"]).float()
        return {"ce": F.cross_entropy(logits_BC, batch["labelled"]["label"]), "size": logits_BC.square().mean()}


def trainer(**settings: object) -> Trainer:
    """Quiet SGD without momentum on one CPU."""
    settings.setdefault("optimizer", Optimizer(lr=0.1, momentum=0.0))
    if "epochs" not in settings:
        settings.setdefault("steps", 6)
    return Trainer(accelerator="cpu", **settings)  # type: ignore[arg-type]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> list[str]:
    """Names of the tensors that are not the same bit for bit (NaN equals NaN)."""
    assert list(first) == list(second)
    return [n for n in names or first if not torch.equal(first[n].nan_to_num(7.0), second[n].nan_to_num(7.0))]
