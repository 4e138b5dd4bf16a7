"""Small teachers and samples to fill stores with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.models import Outputs
from limbeck.teachers import Frozen, Teacher

CLASSES = 7


def samples(count: int = 50, first: int = 0, seed: int = 0) -> Samples:
    """Pictures 3x8x8 with labels; sample number i is the same whatever `first` and `count`."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (1000, 3, 8, 8), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, CLASSES, (1000,), generator=generator)
    index = torch.arange(first, first + count)
    return Samples({"image": image[index], "label": label[index], "index": index}, [str(c) for c in range(CLASSES)])


def net(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, classes),
    )  # fmt: skip


def teacher(seed: int = 0) -> Frozen:
    return Frozen(net(seed))


class Everything(Teacher):
    """Logits, embedding and features of one network."""

    def __init__(self) -> None:
        self.net = net().eval()

    def fingerprint(self) -> str:
        return "everything"

    def __call__(self, fields, view: str) -> Outputs:
        inner = self.net[:3](fields[view])
        pooled = self.net[3:5](inner)
        return Outputs(logits=self.net[5](pooled), features={"inner": inner}, embedding=pooled)


def as_floats(part: Samples) -> Tensor:
    return part.fields["image"].float() / 255
