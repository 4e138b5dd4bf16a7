import pytest
import torch

from limbeck.data import Samples
from limbeck.errors import UserError


def samples(n=6, classes=3):
    return Samples({"image": torch.arange(n).view(n, 1, 1, 1).byte(), "label": torch.arange(n) % classes})


def test_index_counts_from_zero_and_every_selection_keeps_it():
    chosen = samples().select([5, 1, 3]).select([2, 0])
    assert chosen.index.tolist() == [3, 5]
    assert chosen.fields["image"].flatten().tolist() == [3, 5]


def test_a_selection_without_some_class_keeps_all_classes():
    chosen = samples().select([0, 3])
    assert chosen.num_classes == 3 and chosen.labels.tolist() == [0, 0]


def test_a_batch_slices_every_kind_of_column_and_leaves_uint8():
    tokens = {"input_ids": torch.arange(8).view(4, 2), "attention_mask": torch.ones(4, 2)}
    columns = {"image": torch.zeros(4, 1, 2, 2).byte(), "text": ["a", "b", "c", "d"], "tokens": tokens}
    batch = Samples(columns).batch(torch.tensor([3, 1]))
    assert batch["image"].dtype == torch.uint8 and batch["text"] == ["d", "b"]
    assert batch["tokens"]["input_ids"].tolist() == [[6, 7], [2, 3]]
    assert batch["index"].tolist() == [3, 1]


def test_without_a_field_the_classes_stay_known():
    unlabelled = samples().without("label")
    assert unlabelled.num_classes == 3 and "label" not in unlabelled.batch(torch.tensor([0]))
    with pytest.raises(UserError, match="no field 'label'"):
        _ = unlabelled.labels


def test_a_label_out_of_range_is_named_with_its_row_and_the_range():
    with pytest.raises(UserError, match=r"label of row 2 is 7, expected 0\.\.1 "):
        Samples({"label": torch.tensor([0, 1, 7])}, classes=["cat", "dog"])
    with pytest.raises(UserError, match=r"row 1 is -1"):
        Samples({"label": torch.tensor([0, -1])})


def test_nan_is_named_with_its_field_and_row():
    features = torch.zeros(5, 3)
    features[3, 1] = float("nan")
    with pytest.raises(UserError, match="'features' holds NaN in 1 rows, first in row 3"):
        Samples({"features": features})
    with pytest.raises(UserError, match="'score' holds NaN"):
        Samples({"score": torch.tensor([1.0, float("nan")])})


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="all of one length"):
        Samples({"image": torch.zeros(3, 1, 2, 2), "label": torch.zeros(4).long()})


def test_float_labels_are_values_and_not_classes():
    assert Samples({"label": torch.tensor([0.5, 3.0])}).classes is None
