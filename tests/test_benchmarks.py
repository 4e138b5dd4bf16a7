"""The numbers in `benchmarks/README.md` are those of the committed result files, and every benchmark has one."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import common, tables

FILES = sorted(common.RESULTS.glob("*.json"))
PROGRAMS = [
    path.stem for path in sorted(tables.README.parent.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")
]


def test_the_tables_in_the_readme_are_those_of_the_files(tmp_path):
    readme = Path(shutil.copy(tables.README, tmp_path))
    assert not tables.update(readme)


def test_the_readme_shows_every_file():
    assert sorted(tables.names(tables.README.read_text(encoding="utf-8"))) == [path.stem for path in FILES]


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "tables"])
def test_every_benchmark_has_results(program):
    assert any(path.stem.startswith(program) for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_was_measured_where(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["benchmark"] == path.stem and content["rows"]
    assert {"cpu", "cores", "threads", "torch"} <= content["machine"].keys()


def test_a_changed_result_changes_the_table(tmp_path):
    readme = Path(shutil.copy(tables.README, tmp_path))
    results = Path(shutil.copytree(common.RESULTS, tmp_path / "results"))
    content = json.loads((results / "loop.json").read_text(encoding="utf-8"))
    content["rows"][0]["ratio"] = 123.0
    (results / "loop.json").write_text(json.dumps(content), encoding="utf-8")
    assert tables.update(readme, results) and "| 123 |" in readme.read_text(encoding="utf-8")


def test_a_ratio_is_the_median_over_the_rounds():
    timing = common.Timing({"ours": [1.0, 4.0, 3.0], "theirs": [1.0, 2.0, 1.0]}, 0.01)
    expected = {"ratio": 2.0, "lowest": 1.0, "highest": 3.0, "best": 1.0, "rounds": 3, "others": 0.01}
    assert timing.compare("ours", "theirs") == expected


def test_what_is_compared_runs_in_turn():
    seen = []
    common.in_turn({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2, more=1)
    assert seen == ["a", "b", "a", "b", "b", "a"]


def test_disturbed_rounds_are_run_again(monkeypatch):
    busy = iter([0.0, 1000.0, 1000.0, 1000.0])  # others worked in the first round
    monkeypatch.setattr(common, "_busy_elsewhere", lambda: next(busy))
    seen = []
    assert common.in_turn({"a": lambda: seen.append("a")}, 1).others == 0
    assert len(seen) == 3
