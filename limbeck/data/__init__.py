"""Samples, their splits, streams of batches, views and mixing."""

from limbeck.data.images import EncodedImages
from limbeck.data.mixing import Mix, cutmix, from_mask, mixup, permutation
from limbeck.data.samples import Data, Samples
from limbeck.data.sources import data_folder, load_data
from limbeck.data.splits import (
    class_mismatch,
    long_tailed,
    noisy_labels,
    only_classes,
    partition_clients,
    split_labels,
    subset,
    train_validation,
)
from limbeck.data.streams import Stream
from limbeck.data.text import tokenize
from limbeck.data.views import Identity, MultiCrop, On, SimCLR, Strong, View, Weak, make_view

__all__ = [
    "Data",
    "EncodedImages",
    "Identity",
    "Mix",
    "MultiCrop",
    "On",
    "Samples",
    "SimCLR",
    "Stream",
    "Strong",
    "View",
    "Weak",
    "class_mismatch",
    "cutmix",
    "data_folder",
    "from_mask",
    "load_data",
    "long_tailed",
    "make_view",
    "mixup",
    "noisy_labels",
    "only_classes",
    "partition_clients",
    "permutation",
    "split_labels",
    "subset",
    "tokenize",
    "train_validation",
]
