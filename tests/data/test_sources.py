import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from limbeck.data import data_folder, load_data, sources
from limbeck.data.images import EncodedImages
from limbeck.errors import UserError

needs_cifar = pytest.mark.skipif(
    not (data_folder() / "cifar10").is_dir(), reason="the data set cifar10 is not in LIMBECK_DATA"
)


def save_picture(path, value, size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def class_folders(folder, counts, value=0):
    for name, count in counts.items():
        for i in range(count):
            save_picture(folder / name / f"{i:03}.png", value + i)


def encoded(tmp_path, value):
    save_picture(tmp_path / "one.png", value)
    return {"bytes": (tmp_path / "one.png").read_bytes(), "path": None}


def test_importing_the_room_leaves_the_slow_libraries_alone():
    slow = "{'datasets', 'kornia', 'sklearn', 'pyarrow', 'PIL'}"
    code = f"import sys, limbeck.data; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_digits_are_split_by_seed_with_the_classes_in_proportion():
    data, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert (len(data.train), len(data.validation), len(data.test)) == (1213, 135, 449)
    assert data.num_classes == 10 and data.train.fields["image"].shape[1:] == (1, 8, 8)
    assert data.train.fields["image"].dtype == torch.uint8 and int(data.train.fields["image"].max()) == 255
    everything = torch.cat([data.train.index, data.validation.index, data.test.index])
    assert everything.sort().values.tolist() == list(range(1797))
    assert torch.equal(data.test.index, again.test.index) and not torch.equal(data.test.index, other.test.index)
    counts = torch.bincount(data.test.labels)
    assert counts.max() - counts.min() <= 3


def test_few_labels_leave_the_rest_unlabelled():
    data = load_data("digits", labels_per_class=4)
    assert len(data.train) == 40 and len(data.unlabelled) == 1213 and "label" not in data.unlabelled.fields
    rest = load_data("digits", labels_per_class=4, keep_labelled_in_unlabelled=False)
    assert len(rest.unlabelled) == 1173 and torch.equal(rest.train.index, data.train.index)


def test_a_limit_bounds_all_splits_or_those_named():
    data = load_data("digits", limit=100)
    assert (len(data.train), len(data.validation), len(data.test)) == (100, 100, 100)
    assert torch.bincount(data.train.labels).min() >= 9
    named = load_data("digits", limit={"test": 50})
    assert (len(named.train), len(named.test)) == (1213, 50)


def test_class_folders_with_and_without_splits(tmp_path):
    class_folders(tmp_path / "split" / "train", {"cat": 3, "dog": 2})
    class_folders(tmp_path / "split" / "test", {"dog": 2}, value=100)
    data = load_data(tmp_path / "split")
    assert data.classes == ["cat", "dog"] and data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [1, 1] and data.test.fields["image"][1].unique().tolist() == [101]
    class_folders(tmp_path / "flat", {"a": 10, "b": 10})
    flat = load_data(tmp_path / "flat", test_fraction=0.2, validation_fraction=0.25)
    assert (len(flat.train), len(flat.validation), len(flat.test)) == (12, 4, 4)
    assert torch.bincount(flat.test.labels).tolist() == [2, 2]


def test_a_folder_of_unlabelled_pictures_is_a_split(tmp_path):
    class_folders(tmp_path / "train", {"cat": 3, "dog": 3})
    save_picture(tmp_path / "unlabelled" / "x.png", 7)
    data = load_data(tmp_path, test_fraction=0.5)
    assert "label" not in data.unlabelled.fields and data.unlabelled.fields["image"].unique().tolist() == [7]


def test_pictures_over_the_memory_limit_decode_when_they_are_asked_for(tmp_path):
    class_folders(tmp_path / "train", {"cat": 3})
    class_folders(tmp_path / "test", {"cat": 1})
    data = load_data(tmp_path, memory_limit=200)
    assert isinstance(data.train.fields["image"], EncodedImages)
    assert isinstance(data.test.fields["image"], torch.Tensor)
    assert data.train.batch(torch.tensor([2]))["image"].unique().tolist() == [2]


def test_an_unreadable_picture_is_named_by_its_path(tmp_path):
    class_folders(tmp_path / "train", {"cat": 3})
    (tmp_path / "train" / "cat" / "001.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="001.png cannot be read"):
        load_data(tmp_path, test_fraction=0.5)


def test_parquet_in_the_layout_of_hugging_face(tmp_path):
    for split, values in {"train": [1, 2], "validation": [9]}.items():
        for shard, value in enumerate(values):
            table = pa.table({"image": [encoded(tmp_path, value)], "label": [value % 2], "score": [0.5], "name": ["x"]})
            features = {"label": {"names": ["even", "odd"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
            file = tmp_path / "set" / "data" / f"{split}-0000{shard}-of-00002.parquet"
            parquet.write_table(table.replace_schema_metadata(metadata), file)
    data = load_data(tmp_path / "set")
    assert data.classes == ["even", "odd"] and data.train.labels.tolist() == [1, 0]
    assert data.train.fields["image"].float().mean((1, 2, 3)).tolist() == [1.0, 2.0]
    assert data.train.fields["score"].dtype == torch.float32 and data.train.fields["name"] == ["x", "x"]
    assert data.validation is None and data.test.labels.tolist() == [1]  # the only held-out split is the test
    with pytest.raises(UserError, match="has no column 'lable', it has image, label, score, name"):
        load_data(tmp_path / "set", label_column="lable")


def test_a_data_set_of_the_hub_reads_as_its_parquet_does():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    tables = sources._hub_tables(datasets.DatasetDict({"train": train.select([2, 0]), "other": train}))
    fields = sources._from_tables(tables, "set", sources._Columns(None, None, None, None))
    assert list(fields) == ["train"] and fields["train"]["classes"] == ["no", "yes"]
    assert fields["train"]["text"] == ["c", "a"] and fields["train"]["label"].tolist() == [1, 0]


def test_texts_in_csv_and_jsonl_with_labels_that_are_words(tmp_path):
    (tmp_path / "train.csv").write_text('text,label\n"good, very",pos\nbad,neg\n"two\nlines",neg\n')
    (tmp_path / "test.csv").write_text("text,label\nfine,pos\n")
    data = load_data(tmp_path)
    assert data.classes == ["neg", "pos"] and data.train.labels.tolist() == [1, 0, 0]
    assert data.train.fields["text"] == ["good, very", "bad", "two\nlines"]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(json.dumps({"sentence": f"s{i}", "label": i % 2}) for i in range(8)))
    one = load_data(file, text_column="sentence", test_fraction=0.25)
    assert len(one.test) == 2 and sorted(one.train.fields["text"] + one.test.fields["text"])[0] == "s0"
    with pytest.raises(UserError, match="has no column 'text', it has sentence, label: pass text_column"):
        load_data(file)


def test_an_empty_text_is_named_with_its_column_and_row(tmp_path):
    table = pa.table({"text": ["a", None], "label": [0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="column 'text' of the train .* is empty in row 1"):
        load_data(tmp_path)


def test_arrays_tensors_and_texts_in_memory():
    images = np.zeros((6, 4, 4), dtype=np.uint8)
    data = load_data({"train": (images, [0, 1, 2, 0, 1, 2]), "test": (torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1]))})
    assert data.train.fields["image"].shape == (6, 1, 4, 4) and data.num_classes == 3 == data.test.num_classes
    table = load_data({"train": (np.ones((4, 7)), ["b", "a", "b", "a"]), "val": (np.ones((2, 7)), ["a", "b"])})
    assert table.train.fields["features"].dtype == torch.float32 and table.train.labels.tolist() == [1, 0, 1, 0]
    texts = load_data({"train": (["x", "y"], [0, 1]), "test": (["z"], [1]), "unlabelled": ["u", "v"]})
    assert texts.unlabelled.fields["text"] == ["u", "v"] and texts.unlabelled.num_classes == 2


def test_arrays_that_cannot_be_images_are_refused_with_the_mend():
    labels = np.zeros(4, dtype=int)
    with pytest.raises(UserError, match="move the channels"):
        load_data({"train": (np.zeros((4, 8, 8, 3), np.uint8), labels)})
    with pytest.raises(UserError, match=r"go from 0 to 255, expected 0\.\.1"):
        load_data({"train": (torch.tensor([0.0, 255]).view(2, 1, 1, 1).expand(2, 1, 4, 4), labels[:2])})
    with pytest.raises(UserError, match="no split 'tarin'"):
        load_data({"tarin": (np.zeros((4, 8, 8)), labels)})
    with pytest.raises(UserError, match="no train split"):
        load_data({"test": (np.zeros((4, 8, 8)), labels)})


def test_labels_and_numbers_are_checked_in_every_split():
    features = np.zeros((4, 2))
    with pytest.raises(UserError, match="In the split 'test': The label of row 1 is 5"):
        load_data({"train": (features, [0, 1, 0, 1]), "test": (features[:2], [0, 5])}, classes=["a", "b"])
    features[2, 0] = np.nan
    with pytest.raises(
        UserError, match="In the split 'train': The field 'features' holds NaN in 1 rows, first in row 2"
    ):
        load_data({"train": (features, [0, 1, 0, 1])})


def test_an_empty_folder_and_a_set_that_is_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder .*empty holds no pictures and no parquet"):
        load_data("empty")
    with pytest.raises(UserError, match=r"no data set '\./nothing': looked for nothing and .*nothing"):
        load_data("./nothing")


def test_a_name_is_looked_up_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_DATA", str(tmp_path))
    np.savez(tmp_path / "train.npz", x=np.ones((4, 3)), y=np.array([0, 1, 0, 1]))
    (tmp_path / "bank").mkdir()
    (tmp_path / "train.npz").rename(tmp_path / "bank" / "train.npz")
    data = load_data("bank", test_fraction=0.5)
    assert data.name == "bank" and len(data.train) == 2


@needs_cifar
def test_cifar10_decodes_only_what_the_limit_keeps():
    data = load_data("cifar10", limit={"train": 200, "test": 100}, progress=False)
    assert data.classes[:2] == ["airplane", "automobile"] and data.train.fields["image"].shape == (200, 3, 32, 32)
    assert torch.bincount(data.train.labels).tolist() == [20] * 10
    assert int(data.train.index.max()) > 1000


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pictures_in_memory_take_the_asked_size_as_files_do(dtype):
    images = torch.zeros(6, 1, 8, 12, dtype=dtype)
    images[:, :, :, 2:10] = 200 if dtype == torch.uint8 else 0.8  # the centre square
    given = {"train": (images, torch.arange(6) % 2), "test": (images, torch.arange(6) % 2)}
    square = load_data(given, image_size=4).train.fields["image"]
    assert square.shape == (6, 1, 4, 4) and square.dtype == dtype
    assert torch.equal(square, torch.full_like(square, images.max().item()))
    assert load_data(given, image_size=(4, 10)).test.fields["image"].shape == (6, 1, 4, 10)


def test_the_embedded_digits_take_the_asked_size():
    assert load_data("digits", image_size=16).train.fields["image"].shape[1:] == (1, 16, 16)
