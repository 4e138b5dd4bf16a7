"""Networks: loaders, reference nets, taps on inner layers, adapters, heads, costs, export."""

from limbeck.models.adapters import Adapter, adapter_for
from limbeck.models.audio import Exits, PooledTaps, load_audio_model, mlp_projector, pooled
from limbeck.models.audio_ntt import AudioNTT
from limbeck.models.cost import (
    Cost,
    count_flops,
    count_parameters,
    count_weight_bytes,
    measure_cost,
    measure_latency,
)
from limbeck.models.encoders import (
    BiEncoder,
    CrossEncoder,
    PairScorer,
    cross_encoder,
    load_encoder,
    pool_states,
    score_pairs,
)
from limbeck.models.export import check_onnx, export_model
from limbeck.models.heads import class_count, find_head, split_head
from limbeck.models.language import (
    CausalLM,
    MaskedLM,
    Written,
    generate,
    load_language_model,
    require_output_layer,
    require_same_vocabulary,
    vocabulary_size,
)
from limbeck.models.load import load_model, save_model
from limbeck.models.mae import (
    MaskedAutoencoder,
    kept_patches,
    load_masked_autoencoder,
    patch_targets,
    patchify,
    random_masking,
    sin_cos_positions,
    unpatchify,
)
from limbeck.models.masks import Masked, MaskNet, mask_for, masked
from limbeck.models.modes import evaluating
from limbeck.models.moe import DenseGateNet, GateNet, TopKRouter, top_k
from limbeck.models.multimodal import MultimodalClassifier, OneModality, load_multimodal_model
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
from limbeck.models.norm import SyncBatchNorm, convert_sync_batchnorm, with_batch_statistics
from limbeck.models.normalize import IMAGENET_MEAN, IMAGENET_STD, Normalize, Normalized
from limbeck.models.outputs import Outputs, TopK
from limbeck.models.projector import Projector
from limbeck.models.quantize import Quantized, VectorQuantizer, code_usage
from limbeck.models.segmentation import MiniDeepLab, load_segmenter, require_classes
from limbeck.models.taps import Taps
from limbeck.models.unwrap import core_network
from limbeck.models.weights import load_weights, save_weights

__all__ = [
    "unpatchify",
    "random_masking",
    "sin_cos_positions",
    "patchify",
    "patch_targets",
    "load_masked_autoencoder",
    "kept_patches",
    "MaskedAutoencoder",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NETS",
    "Adapter",
    "AudioNTT",
    "BiEncoder",
    "CausalLM",
    "CifarResNet",
    "Cost",
    "CrossEncoder",
    "DenseGateNet",
    "Exits",
    "GateNet",
    "MaskNet",
    "Masked",
    "MaskedLM",
    "MiniDeepLab",
    "Mlp",
    "MultimodalClassifier",
    "Normalize",
    "Normalized",
    "OneModality",
    "Outputs",
    "PairScorer",
    "PooledTaps",
    "Projector",
    "Quantized",
    "SmallCnn",
    "SmallViT",
    "SyncBatchNorm",
    "Taps",
    "TopK",
    "TopKRouter",
    "VectorQuantizer",
    "Written",
    "adapter_for",
    "check_onnx",
    "class_count",
    "code_usage",
    "convert_sync_batchnorm",
    "core_network",
    "count_flops",
    "count_parameters",
    "count_weight_bytes",
    "cross_encoder",
    "evaluating",
    "export_model",
    "find_head",
    "generate",
    "load_audio_model",
    "load_encoder",
    "load_language_model",
    "load_model",
    "load_multimodal_model",
    "load_segmenter",
    "load_weights",
    "mask_for",
    "masked",
    "measure_cost",
    "measure_latency",
    "mlp_projector",
    "pool_states",
    "pooled",
    "require_classes",
    "require_output_layer",
    "require_same_vocabulary",
    "resnet110",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "save_model",
    "save_weights",
    "score_pairs",
    "split_head",
    "top_k",
    "vocabulary_size",
    "with_batch_statistics",
]
