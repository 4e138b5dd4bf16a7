"""Distillation at vocabulary size: time against its own matrix products, and extra memory, of several versions.

    python -m benchmarks.vocabulary
    python -m benchmarks.vocabulary --device cuda --dtype bfloat16 --tokens 8192 --vocabulary 128256 --widths 2048 4096

Every version computes a divergence between two output layers and its gradients by the student's hidden states and
weights. `products` is the floor: the four matrix products alone, whole, into memory that is there already. Each version
runs in turn with the products; `ratio` is the median of the rounds' ratios, `best` the shortest time by the shortest of
the products. `extra MiB` is the peak resident memory of a fresh process above what it holds once the inputs are made
(on CUDA: torch's peak of allocated memory above the inputs), `error` the largest difference of value and gradients to
whole logits, by the largest number.

`--liger DIR`: a folder with Liger Kernel, for its chunked Jensen-Shannon loss; left out with one line where it cannot
be imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, in_turn, judged, machine, say, write
from limbeck import losses

OURS = ("forward", "reverse", "jensen_shannon", "skew", "skew_reverse", "total_variation", "taid")
NAIVE = {
    "naive forward": losses.kl_divergence,
    "naive jensen_shannon": losses.jensen_shannon,
}
Version = Callable[[], tuple[Tensor, ...]]  # -> (loss, gradient of the hidden states, of the weights)


class Inputs:
    """Hidden states and output layers of random numbers; logits have a standard deviation of 2."""

    def __init__(self, args: argparse.Namespace) -> None:
        generator = torch.Generator(args.device).manual_seed(0)
        student, teacher = args.widths
        made = {"generator": generator, "device": args.device, "dtype": getattr(torch, args.dtype)}
        self.hidden_ND = torch.randn(args.tokens, student, **made).requires_grad_()
        self.weight_VD = torch.randn(args.vocabulary, student, **made).mul_(2 * student**-0.5).requires_grad_()
        self.teacher_NE = torch.randn(args.tokens, teacher, **made)
        self.teacher_VE = torch.randn(args.vocabulary, teacher, **made).mul_(2 * teacher**-0.5)
        self.labels_N = torch.zeros(args.tokens, dtype=torch.int64, device=args.device)


def products(inputs: Inputs) -> Version:
    """The floor; its memory is made here, once."""
    hidden, weight = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    student, teacher = (hidden.new_empty(len(hidden), len(weight)) for _ in range(2))
    gradients = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=student)
        torch.mm(inputs.teacher_NE, inputs.teacher_VE.t(), out=teacher)
        torch.mm(student, weight, out=gradients[0])
        torch.mm(student.t(), hidden, out=gradients[1])
        return gradients

    return run


def differentiated(inputs: Inputs, loss: Callable[[], Tensor]) -> Version:
    def run() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, [inputs.hidden_ND, inputs.weight_VD])

    return run


def ours(inputs: Inputs, divergence: Any, chunk: int | None) -> Tensor:
    return losses.linear_divergence(
        inputs.hidden_ND,
        inputs.weight_VD,
        inputs.teacher_NE,
        inputs.teacher_VE,
        divergence=divergence,
        t=0.5,
        scale_by_t2=False,
        reduction="mean",
        chunk=chunk,
    )


def naive(inputs: Inputs, divergence: Callable[..., Tensor]) -> Tensor:
    """Whole logits, one of our functions of whole logits, autograd."""
    student = F.linear(inputs.hidden_ND, inputs.weight_VD)
    teacher = F.linear(inputs.teacher_NE, inputs.teacher_VE)
    return divergence(student, teacher, scale_by_t2=False, reduction="mean")


def naive_kl_div(inputs: Inputs) -> Tensor:
    """Whole logits, `kl_div` of torch, autograd: what one writes by hand."""
    student = F.linear(inputs.hidden_ND, inputs.weight_VD).float().log_softmax(-1)
    teacher = F.linear(inputs.teacher_NE, inputs.teacher_VE).float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def liger(inputs: Inputs, folder: str, compiled: bool) -> Callable[[], Tensor]:
    sys.path.append(folder)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=compiled)
    given = (inputs.hidden_ND, inputs.weight_VD, inputs.teacher_NE, inputs.teacher_VE, inputs.labels_N)
    return lambda: loss(*given)


def version(name: str, inputs: Inputs, args: argparse.Namespace) -> Version:
    if name == "products":
        return products(inputs)
    if name == "naive kl_div":
        return differentiated(inputs, partial(naive_kl_div, inputs))
    if name in NAIVE:
        return differentiated(inputs, partial(naive, inputs, NAIVE[name]))
    if name.startswith("liger"):
        return differentiated(inputs, liger(inputs, args.liger, compiled="compiled" in name))
    return differentiated(inputs, partial(ours, inputs, name, args.chunk))


def peak(name: str, args: argparse.Namespace) -> int:
    """In this process: bytes above the inputs that one run of a version holds at most."""
    inputs = Inputs(args)
    run = version(name, inputs, args)
    if args.device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Not getrusage's ru_maxrss: a process inherits that from the one that started it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    """Bytes from Linux's account of this process: VmRSS now, VmHWM the peak since `clear_refs`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measure_memory(name: str, given: list[str]) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vocabulary", *given, "--peak-of", name]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    return int(answer.stdout.split()[-1])


def measure_error(name: str, reference: str, inputs: Inputs, args: argparse.Namespace) -> float:
    """The largest difference of value and gradients, each relative to the largest number of the reference."""
    found, wanted = (version(each, inputs, args)() for each in (name, reference))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--widths", type=int, nargs=2, default=[512, 1024], help="of student and teacher")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="places at a time; the library's choice when left out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--versions", nargs="*", help="only these")
    parser.add_argument("--liger", help="a folder with Liger Kernel")
    parser.add_argument("--json", type=Path, help="write here instead of results/vocabulary.json")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def waited(run: Version, device: str) -> Version:
    """The run and, on CUDA, the wait until it is done."""

    def whole() -> tuple[Tensor, ...]:
        found = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return whole


def measure(name: str, inputs: Inputs, args: argparse.Namespace, given: list[str]) -> Row:
    """Time, memory and, where the naive version computes the same, the difference to it."""
    runs = {each: waited(version(each, inputs, args), args.device) for each in ("products", name)}
    timing = in_turn(runs, args.rounds)
    row: Row = {"version": name, "seconds": timing.best(name), **timing.compare(name, "products")}
    row["extra MiB"] = measure_memory(name, given) / 2**20
    reference = {"forward": "naive kl_div", "jensen_shannon": "naive jensen_shannon"}.get(name)
    return row | ({"error": measure_error(name, reference, inputs, args)} if reference else {})


def main(given: list[str]) -> bool:
    args = arguments(given)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args.peak_of, args))
        return True
    names, inputs = ["naive kl_div", *NAIVE, *OURS], Inputs(args)
    if args.liger:
        try:
            liger(inputs, args.liger, compiled=False)
            names += ["liger jensen_shannon", "liger jensen_shannon compiled"]
        except ImportError as error:
            print(f"Liger Kernel is left out: {error}")
    rows: list[Row] = []
    for name in args.versions or names:
        row = measure(name, inputs, args, given)
        naive_row = next((each for each in rows if each["version"] == "naive kl_div"), None)
        if naive_row is not None:
            row["memory of naive"] = row["extra MiB"] / naive_row["extra MiB"]
        if name in OURS:
            row = judged(row, most=1.15)
            row["met"] &= row.get("memory of naive", 0.0) <= 0.25 and row.get("error", 0.0) <= 1e-5
        say(row)
        rows.append(row)
    settings = {key: getattr(args, key) for key in ("tokens", "vocabulary", "widths", "dtype", "device", "chunk")}
    if args.json:
        content = {"benchmark": "vocabulary", "machine": machine(args.device), "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    else:
        write("vocabulary", rows, settings, machine(args.device))
    return all(row.get("met", True) for row in rows)


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
