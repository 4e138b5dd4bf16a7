"""Rows are found by number whatever the numbers are, and read alike from one shard or several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import ipc

from limbeck.errors import UserError
from limbeck.files import write_text
from limbeck.teachers.columns import Kept
from limbeck.teachers.store import Manifest, Store, schema_of, shard_record, write_rows


def make(path: Path, index: torch.Tensor, shards: int) -> Store:
    """Each number's row holds the number, and the number modulo 4 tokens, at the places 0, 1, ...."""
    path.mkdir()
    records = []
    for number, some in enumerate(index.chunk(shards)):
        counts = (some % 4).numpy()
        places = torch.cat([torch.arange(count) for count in counts])
        tokens = torch.stack([torch.repeat_interleave(some, torch.from_numpy(counts)), places], 1)
        columns = {
            "index": Kept.of(some),
            "version": Kept.of(torch.zeros(len(some), dtype=torch.int32)),
            "place": Kept.of(places, counts),
            "seen/logits": Kept.of(tokens.float(), counts),
            "seen/embedding": Kept.of(some.float()[:, None].expand(-1, 3)),
        }
        file = path / f"shard-{number:05d}.arrow"
        write_rows(file, columns, None)
        records.append(shard_record(file, len(some)))
    schema, _ = schema_of(ipc.open_file(pa.memory_map(str(file))).schema)
    write_text(path / "manifest.json", Manifest("none", {"name": "none"}, {"versions": 1}, schema, records).to_json())
    return Store(path)


NUMBERS = {
    "from zero": torch.arange(60),
    "from further on, with gaps": torch.arange(1000, 1120, 2),
    "far apart": torch.arange(60) ** 4 - 500,
    "in any order": torch.randperm(60, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("shards", [1, 5])
def test_each_number_has_its_own_answers(tmp_path, numbers, shards):
    index = NUMBERS[numbers]
    store = make(tmp_path / "store", index, shards)
    asked = index[torch.randint(len(index), (40,), generator=torch.Generator().manual_seed(1))]
    rows = store.rows(asked.numpy())
    assert len(rows) == 40 and torch.equal(store.take("index", rows), asked)
    assert torch.equal(store.take("seen/embedding", rows)[:, 2], asked.float())
    counts = store.count_tokens(rows)
    assert np.array_equal(counts, asked % 4)
    tokens = store.take_tokens("seen/logits", rows)
    assert torch.equal(tokens[:, 0], torch.repeat_interleave(asked, asked % 4).float())
    assert torch.equal(tokens[:, 1], torch.cat([torch.arange(count) for count in counts]).float())
    assert torch.equal(store.take_tokens("place", rows), tokens[:, 1].long())


@pytest.mark.parametrize("numbers", NUMBERS)
def test_a_number_without_answers_is_named(tmp_path, numbers):
    index = NUMBERS[numbers]
    store = make(tmp_path / "store", index, 2)
    for absent in (int(index.min()) - 1, int(index.max()) + 1, int(index.max()) + 10**9):
        assert absent not in store and int(index[7]) in store
        with pytest.raises(UserError, match=f"no answer for 1 of 2 samples .*index {absent}, version 0"):
            store.rows(np.array([int(index[7]), absent]))


@pytest.mark.parametrize("shards", [1, 5])
def test_no_rows_at_all_are_read_too(tmp_path, shards):
    store = make(tmp_path / "store", NUMBERS["from zero"], shards)
    rows = store.rows(np.empty(0, dtype=np.int64))
    assert store.take("seen/embedding", rows).shape == (0, 3) and store.take_tokens("seen/logits", rows).shape == (0, 2)
