"""`limbeck label` from the command line: filled, killed and resumed, looked over, trained from."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from limbeck.cli import main
from limbeck.data import load_data
from limbeck.models import load_model, split_head
from limbeck.recipes import label as label_by_recipe
from limbeck.recipes import run
from limbeck.teachers import Store, Stored, filling
from tests.recipes.label_runs import SETTINGS, recipe

KILLS = 20


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.glob("shard-*.arrow")}


class Labeller:
    """A process that forks one `limbeck label` after another."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent.parent
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.recipes.label_runs"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def label(self, file: Path, store: Path, kill_after: float | None = None) -> int:
        """How it ended: 0, or minus the number of the signal that killed it after so many seconds."""
        self.server.stdin.write(f"{file} {store}\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        return int(self.server.stdout.readline())


@pytest.fixture
def labeller():
    made = Labeller()
    yield made
    made.server.stdin.close()
    made.server.wait()


def test_labelling_killed_at_20_random_moments_ends_as_if_nothing_had_happened(tmp_path, labeller):
    file = recipe(tmp_path)
    assert labeller.label(file, tmp_path / "warm") == 0
    began = time.perf_counter()
    assert labeller.label(file, tmp_path / "whole") == 0
    duration = time.perf_counter() - began
    whole, draw = contents(tmp_path / "whole"), random.Random(0)
    killed = attempt = 0
    while killed < KILLS:
        store = tmp_path / str(attempt)
        attempt += 1
        assert attempt < 4 * KILLS, f"only {killed} of {KILLS} processes could be killed before their end"
        for _ in range(3):  # several kills in a row, then to the end
            killed += labeller.label(file, store, draw.uniform(0, duration)) == -signal.SIGKILL
        assert labeller.label(file, store) == 0
        assert contents(store) == whole
        Store(store).verify()
        assert Store(store).manifest == Store(tmp_path / "whole").manifest


def test_a_store_is_filled_looked_over_and_trained_from(tmp_path, capsys):
    file, store = recipe(tmp_path), str(tmp_path / "store")
    assert main(["label", str(file), "--store", store, "--verify", *SETTINGS]) == 0
    said = capsys.readouterr().out
    assert "every shard is as it was written" in said and "bytes a row" in said
    assert main(["label", "--verify", "--store", store]) == 0
    result = run(file, {"teacher": {"store": store}}, workspace=tmp_path / "run", report=False)
    assert result.metrics["steps"] == 10
    shard = next(Path(store).glob("shard-*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["label", "--verify", "--store", store]) == 2
    assert shard.name in capsys.readouterr().err


def test_a_recipe_names_its_store_and_its_teacher(tmp_path):
    """With both, the store must be that teacher's; with the store alone it is taken as it is."""
    file = recipe(tmp_path)
    both = {"teacher.store": str(tmp_path / "store"), "streams.labelled.views.weak": "identity"}
    assert label_by_recipe(file, both) is not None
    stored = run(file, both, workspace=tmp_path / "stored", report=False)
    live = run(file, {"streams.labelled.views.weak": "identity"}, workspace=tmp_path / "live", report=False)
    weights = zip(stored.student.parameters(), live.student.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    other = {**both, "teacher.name": "small_cnn", "teacher.weights": str(tmp_path / "run" / "student")}
    (tmp_path / "other").mkdir()
    run(recipe(tmp_path / "other"), workspace=tmp_path / "run", report=False)
    other["teacher.config"] = {"channels": [4, 4, 4]}
    with pytest.raises(ValueError, match="filled by another teacher"):
        run(file, other, workspace=tmp_path / "wrong", report=False)


def test_labelling_fits_the_streams_of_a_system(tmp_path):
    """A store answers for the samples of several streams or splits, each once."""
    file = recipe(tmp_path)
    store = label_by_recipe(file, store=tmp_path / "store", streams=["train", "validation"], batch_size=64)
    data = load_data("digits", validation_fraction=0.1)
    assert len(store) == len(data.train) + len(data.validation)


def test_embeddings_and_named_features_are_kept(tmp_path):
    """The embedding is what the head reads: head(embedding) are the logits."""
    file, store = recipe(tmp_path), tmp_path / "store"
    keep = ["--keep", "logits", "embedding", "--features", "0.blocks.0", "--dtype", "bfloat16"]
    teacher = load_model(tmp_path / "teacher").eval()
    names = [name for name, module in teacher.named_modules() if isinstance(module, torch.nn.Conv2d)]
    keep[keep.index("0.blocks.0")] = names[-1]
    assert main(["label", str(file), "--store", str(store), "--views", "[]", *keep]) == 0
    stored, data = Stored(store), load_data("digits", validation_fraction=0.1)
    batch = data.train.batch(torch.arange(8))
    answer = stored({"index": batch["index"]}, stored.settings["field"])
    torch.testing.assert_close(split_head(teacher)[1](answer.embedding), answer.logits, atol=0.1, rtol=0.05)
    assert answer.features[names[-1]].dim() == 4


def test_processes_share_out_one_stream_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="name one by --streams train"):
        label_by_recipe(recipe(tmp_path), store=tmp_path / "store", streams=["train", "validation"], share=(0, 2))


def test_two_shares_make_the_store_of_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(filling, "BATCHES_PER_PART", 2)
    file = recipe(tmp_path)
    assert main(["label", str(file), "--store", str(tmp_path / "one"), *SETTINGS]) == 0
    assert main(["label", str(file), "--store", str(tmp_path / "two"), "--share", "0/2", *SETTINGS]) == 0
    assert "parts of other processes are missing" in capsys.readouterr().out
    assert main(["label", str(file), "--store", str(tmp_path / "two"), "--share", "1/2", *SETTINGS]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_two_ray_workers_make_the_store_of_one_process(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install limbeck[cluster]")
    file = recipe(tmp_path)
    assert main(["label", str(file), "--store", str(tmp_path / "one"), *SETTINGS]) == 0
    try:
        assert main(["label", str(file), "--store", str(tmp_path / "ray"), "--ray", "2", *SETTINGS]) == 0
    finally:
        ray.shutdown()
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    Store(tmp_path / "ray").verify()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["label", "kd"], "--store <folder>"),
        (["label"], "give a recipe to label by"),
        (["label", "--verify", "--store", "nowhere"], "there is no store at nowhere"),
        (["label", "supervised", "--store", "x"], "no teacher in a section 'teacher'"),
        (["label", "kd", "--store", "x", "--share", "3/2"], "--share is '3/2'"),
        (["label", "kd", "--store", "x", "--views", "strong"], "no view 'strong' to label"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[1:2] == ["kd"]:
        arguments = ["label", str(recipe(tmp_path)), *arguments[2:]]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
