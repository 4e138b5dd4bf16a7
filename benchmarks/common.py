"""What the benchmarks share: the machine in words, timing in turns, results as files, one line for each measure.

Times on a machine that others use too are only good side by side: what is compared runs in turn, in short blocks, in
one process. `ratio` is the median over the rounds of one block's time by that of its neighbour, `best` the shortest
block by the shortest. Rounds in which other processes worked are run again.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

UNDISTURBED = 0.03  # share of the cores that others may have in a round
RESULTS = Path(__file__).parent / "results"
Action = Callable[[], Any]
Row = dict[str, Any]


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    found = {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


@dataclass(frozen=True)
class Timing:
    """Seconds of every action in each round that counts; `others`: the share of all cores that other processes had."""

    seconds: dict[str, list[float]]
    others: float

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def compare(self, name: str, base: str) -> dict[str, float]:
        """How many times as long as `base` an action takes: over the rounds, and shortest by shortest."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return {
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "best": self.best(name) / self.best(base),
            "rounds": len(ratios),
            "others": self.others,
        }


def in_turn(actions: Mapping[str, Action], rounds: int, *, more: int = 4) -> Timing:
    """Run all actions in every round, every other round backwards; each runs once before, untimed.

    Benchmarks that run at the same time take turns by rounds. Rounds in which other processes had more than 3 % of the
    cores are run again, up to `more` times as many rounds in all; then the least disturbed ones count.
    """
    for action in actions.values():
        action()
    found: list[tuple[float, dict[str, float]]] = []
    while len(found) < more * rounds and sum(others <= UNDISTURBED for others, _ in found) < rounds:
        with _alone():
            before, started, seconds = _busy_elsewhere(), time.perf_counter(), {}
            for name in list(actions)[:: 1 if len(found) % 2 == 0 else -1]:
                start = time.perf_counter()
                actions[name]()
                seconds[name] = time.perf_counter() - start
            cores = (os.cpu_count() or 1) * (time.perf_counter() - started)
            found.append((max(_busy_elsewhere() - before, 0.0) / cores, seconds))
    counted = sorted(found, key=lambda each: each[0])[:rounds]
    return Timing(
        {name: [seconds[name] for _, seconds in counted] for name in actions},
        statistics.mean(others for others, _ in counted),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Another benchmark on this machine waits until the round is over."""
    with (Path(tempfile.gettempdir()) / "limbeck-benchmark.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _busy_elsewhere() -> float:
    """Seconds that the cores worked for other processes; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def repeat(action: Action, times: int) -> Action:
    """One block: the action so many times."""

    def block() -> None:
        for _ in range(times):
            action()

    return block


def judged(row: Row, *, most: float | None = None, least: float | None = None) -> Row:
    """The row with its target, and whether the median ratio meets it."""
    if most is not None:
        return row | {"target": f"at most {most}", "met": row["ratio"] <= most}
    assert least is not None
    return row | {"target": f"at least {least}", "met": row["ratio"] >= least}


def say(row: Row) -> None:
    """One line."""
    print(", ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)


def shown(value: Any) -> str:
    """A number in few digits, in tables and lines."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def write(benchmark: str, rows: Sequence[Row], settings: Mapping[str, Any], where: Mapping[str, Any]) -> Path:
    """`results/<benchmark>.json`."""
    path = RESULTS / f"{benchmark}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"benchmark": benchmark, "machine": dict(where), "settings": dict(settings), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def finish(benchmark: str, rows: Sequence[Row], settings: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Print the rows, write the file; whether every target is met."""
    for row in rows:
        say(row)
    print(f"written to {write(benchmark, rows, settings, where)}")
    return all(row.get("met", True) for row in rows)
