"""A run that is killed by SIGKILL at a random moment and started again ends with the very same weights."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from tests.train.kill_runs import RUNS, run
from tests.train.toys import differing

POINTS = 4  # for each of the five runs
# Forked from a process that has imported torch once and has run nothing: an import would cost seconds each time.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.kill_runs"])


def start(name: str, folder: Path) -> multiprocessing.Process:
    process = CONTEXT.Process(target=run, args=(name, str(folder)))
    (folder / "started").unlink(missing_ok=True)
    process.start()
    while not (folder / "started").exists() and process.is_alive():
        time.sleep(0.001)
    return process


def finish(name: str, folder: Path) -> dict[str, torch.Tensor]:
    process = start(name, folder)
    process.join()
    assert process.exitcode == 0
    return torch.load(folder / "final.pt", weights_only=True)


def kill(name: str, folder: Path, seconds: float) -> bool:
    """Start or go on with a run, and kill it after some seconds; whether it was not yet finished."""
    process = start(name, folder)
    time.sleep(seconds)
    process.kill()  # SIGKILL
    process.join()
    return not (folder / "final.pt").exists()


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(name, tmp_path):
    random_moments = random.Random(name)
    (tmp_path / "whole").mkdir()
    process = start(name, tmp_path / "whole")
    began = time.perf_counter()
    process.join()
    duration = time.perf_counter() - began
    assert process.exitcode == 0
    whole = torch.load(tmp_path / "whole" / "final.pt", weights_only=True)
    killed = 0
    for point in range(4 * POINTS):  # a machine whose speed changes may finish before it is killed
        folder = tmp_path / str(point)
        folder.mkdir()
        killed += kill(name, folder, random_moments.uniform(0, 0.9 * duration))
        if random_moments.random() < 0.5 and not (folder / "final.pt").exists():
            kill(name, folder, random_moments.uniform(0, 0.5 * duration))
        (folder / "final.pt").unlink(missing_ok=True)
        assert not differing(whole, finish(name, folder))
        if killed == POINTS:
            return
    pytest.fail(f"only {killed} of {4 * POINTS} runs could be killed before their end")
