"""Networks: loaders, reference nets, taps on inner layers, adapters, heads, costs, export."""

from limbeck.models.adapters import Adapter, adapter_for
from limbeck.models.cost import (
    Cost,
    count_flops,
    count_parameters,
    count_weight_bytes,
    measure_cost,
    measure_latency,
)
from limbeck.models.export import check_onnx, export_model
from limbeck.models.heads import class_count, find_head, split_head
from limbeck.models.load import load_model, save_model
from limbeck.models.nets import (
    NETS,
    CifarResNet,
    Mlp,
    SmallCnn,
    SmallViT,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from limbeck.models.norm import SyncBatchNorm, convert_sync_batchnorm
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize, Normalized
from limbeck.models.outputs import Outputs
from limbeck.models.taps import Taps
from limbeck.models.unwrap import core_network
from limbeck.models.weights import load_weights, save_weights

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NETS",
    "Adapter",
    "CifarResNet",
    "Cost",
    "Mlp",
    "Normalize",
    "Normalized",
    "Outputs",
    "SmallCnn",
    "SmallViT",
    "SyncBatchNorm",
    "Taps",
    "adapter_for",
    "check_onnx",
    "class_count",
    "convert_sync_batchnorm",
    "core_network",
    "count_flops",
    "count_parameters",
    "count_weight_bytes",
    "export_model",
    "find_head",
    "load_model",
    "load_weights",
    "measure_cost",
    "measure_latency",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "save_model",
    "save_weights",
    "split_head",
]
