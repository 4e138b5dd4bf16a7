"""Reading samples from first to last, as training reads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from limbeck.data import Samples, Stream, to_device
from limbeck.train.method import Fields


def batches(samples: Samples, device: torch.device | str = "cpu", batch_size: int = 256) -> Iterator[Fields]:
    """All samples once, in their order, without views: pictures as float in [0,1], on the device."""
    stream = Stream(samples, batch_size, shuffle=False, drop_last=False)
    stream.open("all", seed=0)
    for _ in range(stream.steps_per_epoch):
        yield stream.render(to_device(stream.next(), torch.device(device)))
