"""Samples, their splits, streams of batches, views and mixing."""

from limbeck.data.audio import AudioData, LogMel, load_audio, log_mel, mel_filters, read_wav, resample
from limbeck.data.audio_views import LogMixup, MaskSpans, RandomWindow, ResizeCrop
from limbeck.data.canvas import on_canvas, shown_share
from limbeck.data.dense import (
    CropFlip,
    box_mix,
    class_mask,
    classes_in,
    load_segmentation,
    paste,
    random_boxes,
)
from limbeck.data.detection import corrupt, load_detection, pad_boxes
from limbeck.data.geometry import Affine, between, warp_boxes
from limbeck.data.graphs import Graph, full_batch, load_graph
from limbeck.data.images import EncodedImages
from limbeck.data.language import LanguageData, MaskTokens, load_language, prompt_tokens
from limbeck.data.mixing import Mix, cutmix, from_mask, mixup, mixup_or_cutmix, permutation
from limbeck.data.multimodal import (
    MultimodalData,
    draw_present,
    drop_modalities,
    load_multimodal,
    pair_by_class,
    pair_by_index,
    require_modalities,
)
from limbeck.data.pairs import Pairs, both_orders, distinct_pairs, load_pairs, read_by, tokenize_pairs
from limbeck.data.photometric import Photometric
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
from limbeck.data.streams import Stream, channels_last, read_rows, seed_of, to_device
from limbeck.data.text import tokenize
from limbeck.data.tokenizers import load_tokenizer, train_wordpiece
from limbeck.data.views import Identity, MultiCrop, On, SimCLR, Strong, View, Weak, make_view

__all__ = [
    "Affine",
    "AudioData",
    "CropFlip",
    "Data",
    "EncodedImages",
    "Graph",
    "Identity",
    "LanguageData",
    "LogMel",
    "LogMixup",
    "MaskSpans",
    "MaskTokens",
    "Mix",
    "MultiCrop",
    "MultimodalData",
    "On",
    "Pairs",
    "Photometric",
    "RandomWindow",
    "ResizeCrop",
    "Samples",
    "SimCLR",
    "Stream",
    "Strong",
    "View",
    "Weak",
    "between",
    "both_orders",
    "box_mix",
    "channels_last",
    "class_mask",
    "class_mismatch",
    "classes_in",
    "corrupt",
    "cutmix",
    "data_folder",
    "distinct_pairs",
    "draw_present",
    "drop_modalities",
    "from_mask",
    "full_batch",
    "load_audio",
    "load_data",
    "load_detection",
    "load_graph",
    "load_language",
    "load_multimodal",
    "load_pairs",
    "load_segmentation",
    "load_tokenizer",
    "log_mel",
    "long_tailed",
    "make_view",
    "mel_filters",
    "mixup",
    "mixup_or_cutmix",
    "noisy_labels",
    "on_canvas",
    "only_classes",
    "pad_boxes",
    "pair_by_class",
    "pair_by_index",
    "partition_clients",
    "paste",
    "permutation",
    "prompt_tokens",
    "random_boxes",
    "read_rows",
    "read_by",
    "read_wav",
    "require_modalities",
    "resample",
    "shown_share",
    "seed_of",
    "split_labels",
    "subset",
    "to_device",
    "tokenize",
    "tokenize_pairs",
    "train_validation",
    "train_wordpiece",
    "warp_boxes",
]
