"""A store is whole, or one sentence says which shard is not; it is read at random and never unpickled."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from limbeck.errors import UserError
from limbeck.teachers import Store, fill
from limbeck.teachers import filling as fillings
from tests.teachers.stores import samples, teacher


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(fillings, "BATCHES_PER_PART", 1)
    monkeypatch.setattr(fillings, "SHARD_BYTES", 3000)
    fill(tmp_path / "store", teacher(), samples(120), batch_size=16)
    return tmp_path / "store"


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("shard-*.arrow"))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def test_rows_come_back_in_the_order_that_they_are_asked_for(path):
    store = Store(path)
    assert len(shards(path)) > 2
    index = np.random.default_rng(0).permutation(120)
    assert np.array_equal(store.take("index", store.rows(index)).numpy(), index)


def test_a_flipped_byte_in_any_shard_is_found_and_named(path):
    store = Store(path)
    draw = random.Random(0)
    for file in shards(path):
        for place in [0, file.stat().st_size - 1, *(draw.randrange(file.stat().st_size) for _ in range(6))]:
            flip(file, place)
            with pytest.raises(UserError, match=f"{file.name} is missing or damaged"):
                store.verify()
            with pytest.raises(UserError, match=f"{file.name} is missing or damaged"):
                Store(path)
            flip(file, place)
    store.verify()
    Store(path)


def test_a_truncated_or_missing_shard_is_named(path):
    file = shards(path)[1]
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match=rf"{file.name} is missing or damaged \(it has {len(content) - 100} bytes"):
        Store(path)
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing or damaged \(it is not there"):
        Store(path)


def test_shards_are_compared_once_and_again_when_they_changed(path, monkeypatch):
    Store(path)
    read = []
    monkeypatch.setattr("limbeck.teachers.store._sha256", lambda file: read.append(file.name) or "other")
    Store(path)
    assert not read
    os.utime(shards(path)[0])
    with pytest.raises(UserError, match="shard-00000"):
        Store(path)
    assert read == ["shard-00000.arrow"]


def test_a_store_that_may_only_be_read_is_read(path):
    (path / "verified.json").unlink(missing_ok=True)
    path.chmod(0o555)
    try:
        assert len(Store(path)) == 120
    finally:
        path.chmod(0o755)


def test_samples_without_an_answer_are_named(path):
    with pytest.raises(UserError, match=r"no answer for 2 of 3 samples \(first: index 500"):
        Store(path).rows(np.array([5, 500, 700]))


def test_a_folder_without_a_store_says_how_to_fill_one(tmp_path):
    with pytest.raises(UserError, match="limbeck label <recipe> --store"):
        Store(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "schema": 3}'])
def test_a_damaged_manifest_is_one_sentence(path, text):
    (path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged or no manifest"):
        Store(path)


def test_a_store_of_a_later_format_is_named(path):
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Store(path)


def test_verify_finds_a_row_that_is_there_twice_and_one_that_is_not(path):
    content = json.loads((path / "manifest.json").read_text())
    first = content["shards"][0]
    (path / "manifest.json").write_text(json.dumps({**content, "shards": [*content["shards"], first]}))
    with pytest.raises(UserError, match="holds a row twice"):
        Store(path).verify()
    settings = {**content["settings"], "versions": 2}
    (path / "manifest.json").write_text(json.dumps({**content, "settings": settings}))
    with pytest.raises(UserError, match="lacks versions"):
        Store(path).verify()


def test_the_manifest_says_what_was_asked_of_whom(path):
    manifest = Store(path).manifest
    assert manifest.teacher == teacher().fingerprint()
    assert manifest.data["samples"] == manifest.rows == 120
    assert {"views", "keep", "top_k", "values", "dtype", "versions", "batch_size", "seed", "precision"} <= {
        *manifest.settings
    }
    assert all(len(shard["sha256"]) == 64 for shard in manifest.shards)


def test_nothing_of_a_store_is_unpickled():
    """No module that reads or writes a store, or an endpoint's answers, has a way to load pickles."""
    folder = Path(fillings.__file__).parent
    for name in ("columns", "store", "filling", "stored", "served", "answers", "asking", "endpoint", "replies"):
        text = (folder / f"{name}.py").read_text()
        found = re.search(
            r"import (pickle|marshal|shelve|dill)|pickle\.|torch\.load|allow_pickle=True|\beval\(|exec\(", text
        )
        assert not found, f"{name}.py: {found}"
