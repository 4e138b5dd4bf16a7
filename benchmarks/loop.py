"""The loop's price: steps of our loop against a hand-written PyTorch loop of the same mathematics, paired in one run.

    python benchmarks/loop.py [digits] [resnet]

`digits`: the demo's CNN, supervised. `resnet`: a CIFAR ResNet-20 taught by a ResNet-56 (KD). Both loops slice the same
batches, apply the same view, compute the same loss in the same memory format and step the same optimiser; ours adds
schedules, metrics, the NaN guard and exact resume. Blocks of steps alternate, and the figure is the median ratio.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples, Stream, Weak
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.supervised import Supervised
from limbeck.models import load_model
from limbeck.teachers import Frozen
from limbeck.train import Loop, Method, Optimizer, Trainer

SGD = Optimizer("sgd", lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def hand_written(student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, batch: int) -> Callable:
    """A plain loop, as one would write it in a script: returns a function that does one step."""
    student.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
    )
    view = Weak(padding=1, flip=False)
    order, position, total = torch.randperm(len(images)), 0, torch.zeros(())

    def step() -> None:
        nonlocal order, position, total
        if position + batch > len(order):
            order, position = torch.randperm(len(images)), 0
        rows = order[position : position + batch]
        position += batch
        x = view(images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        y = labels[rows]
        logits = student(x)
        loss = F.cross_entropy(logits, y)
        if teacher is not None:
            with torch.inference_mode():
                target = teacher(x).div(4).log_softmax(-1)
            kl = F.kl_div(logits.div(4).log_softmax(-1), target.clone(), reduction="batchmean", log_target=True)
            loss = 0.1 * loss + 0.9 * 16 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = total + loss.detach()

    return step


def ours(method: Method, images: Tensor, labels: Tensor, batch: int) -> Callable:
    """The same step by our loop, with a row of metrics every 20 steps."""
    stream = Stream(Samples({"image": images, "label": labels}), batch, {"weak": Weak(padding=1, flip=False)})
    loop = Loop(method, {"labelled": stream}, Trainer(steps=10**6, optimizer=SGD))
    loop.logs.start(0, 10**6)
    method.train()

    def step() -> None:
        loop.step()
        if loop.clock.step % 20 == 0:
            loop.report()

    return step


def paired(name: str, theirs: Callable, mine: Callable, steps: int, pairs: int, limit: float) -> bool:
    """Time blocks in turn and print the median ratio."""
    ratios, seconds = [], []
    for function in (theirs, mine):
        block(function, max(3, steps // 4))
    for number in range(pairs):
        first, second = (theirs, mine) if number % 2 == 0 else (mine, theirs)
        a, b = block(first, steps), block(second, steps)
        hand, loop = (a, b) if number % 2 == 0 else (b, a)
        ratios.append(loop / hand)
        seconds.append((hand, loop))
    hand, loop = (1000 * statistics.median(column) / steps for column in zip(*seconds, strict=True))
    ratio = statistics.median(ratios)
    verdict = "within" if ratio <= limit else "ABOVE"
    print(
        f"{name:<8} hand-written {hand:8.3f} ms a step, loop {loop:8.3f} ms, ratio {ratio:.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {pairs} pairs of {steps} steps): {verdict} {limit}"
    )
    return ratio <= limit


def block(function: Callable, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        function()
    return time.perf_counter() - started


def digits() -> bool:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (1200, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (1200,))
    net = load_model("small_cnn", num_classes=10, in_channels=1, config={"channels": [8, 16, 16]})
    mine = ours(Supervised(copy.deepcopy(net)), images, labels, 64)
    return paired("digits", hand_written(net, None, images, labels, 64), mine, steps=200, pairs=15, limit=1.05)


def resnet() -> bool:
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (1200, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (1200,))
    net = load_model("resnet20", num_classes=10)
    teacher = load_model("resnet56", num_classes=10).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    mine = ours(KD(copy.deepcopy(net), Frozen(copy.deepcopy(teacher))), images, labels, 64)
    return paired("resnet", hand_written(net, teacher, images, labels, 64), mine, steps=8, pairs=11, limit=1.02)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["digits", "resnet"]
    good = [{"digits": digits, "resnet": resnet}[name]() for name in wanted]
    sys.exit(0 if all(good) else 1)
