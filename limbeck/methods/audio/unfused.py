"""UnFuSeD: cluster the target data by an encoder that saw no labels, teach the ids to a fresh small network, tune it.

Seth et al.: UnFuSeD: Unsupervised Finetuning Using Self-supervised Distillation, ICASSP SASB workshop 2023
(arXiv 2303.05668).

    1. encoder:  any network trained without labels, frozen; it is used for one thing only:
    2. cluster:  y = k-means(norm(whiten(PCA(encoder(x)))))           on clean target clips, once
    3. distil:   a randomly initialised student with exits o_1..o_3 on its blocks and o on its last layer:
                     L = CE(o, y) + alpha sum_l CE(o_l, y) + beta sum_l KL(softmax(o) || softmax(o_l))
                         + gamma sum_l (2 - 2 cos(o_l, o))
    4. tune:     the exits are dropped; CE of the student with its own new head on the labels

softmax(o) is not detached: the last layer also moves towards what the blocks can say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.labels import cluster_labels, mutual_information, whiten
from limbeck.losses import cosine_distance, kl_divergence
from limbeck.models import Exits, PooledTaps
from limbeck.models.heads import find_head
from limbeck.teachers import Frozen
from limbeck.train import Batch, CrossEntropy, Losses, Method, Scatter, Stage, Workspace
from limbeck.train.stage import viewed_field

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")  # of AudioNTT


def exit_losses(logits_BK: Tensor, early: Sequence[Tensor], label_B: Tensor, *, detach_target: bool = False) -> Losses:
    """The terms of stage 3 without their weights: `ce` of the last layer, and summed over the earlier exits [B,K]
    `exit_ce`, `kl` (KL(last || exit), a mean over clips) and `feature` (2 - 2 cos of the logits, in [0,4] an exit).

    `detach_target` keeps the last layer from moving towards the exits by `kl`.
    """
    target_BK = logits_BK.detach() if detach_target else logits_BK
    zero = logits_BK.new_zeros(()).float()
    return {
        "ce": F.cross_entropy(logits_BK.float(), label_B),
        "exit_ce": sum((F.cross_entropy(exit_BK.float(), label_B) for exit_BK in early), zero),
        "kl": sum((kl_divergence(e_BK, target_BK, scale_by_t2=False, reduction="batchmean") for e_BK in early), zero),
        "feature": sum((2 * cosine_distance(exit_BK, logits_BK, reduction="mean") for exit_BK in early), zero),
    }


class ClusterDistillation(Method):
    """Stage 3: the student learns the cluster ids at all depths, and its last layer teaches the earlier ones.

    Args:
        exits: the student with its classifiers; what ships is the student alone, its own head untouched.
        ce_weight, kl_weight, feature_weight: alpha, beta, gamma.
        detach_target: no gradient of the KL term into the last layer.
    """

    streams = {"unlabelled": ("weak", "cluster")}
    epoch_stream = "unlabelled"

    def __init__(
        self,
        exits: Exits,
        *,
        ce_weight: float = 0.7,
        kl_weight: float = 0.3,
        feature_weight: float = 0.003,
        detach_target: bool = False,
    ) -> None:
        super().__init__()
        self.exits, self.detach_target = exits, detach_target
        self.weights = {"exit_ce": ce_weight, "kl": kl_weight, "feature": feature_weight}

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["unlabelled"]
        logits_BK, early = self.exits(fields["weak"])
        self.log(cluster_accuracy=(logits_BK.argmax(1) == fields["cluster"]).float().mean())
        return exit_losses(logits_BK, early, fields["cluster"], detach_target=self.detach_target)

    def shipped(self) -> nn.Module:
        return self.exits.network


def unfused(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    encoder: Frozen,
    *,
    distill: Stage,
    finetune: Stage,
    clusters: int = 32,
    pca: int = 128,
    iterations: int = 20,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    feature_weight: float = 0.003,
    detach_target: bool = False,
    freeze: bool = False,
    layer: str = "fc",
    student_layer: str = "fc",
    exits: Sequence[str] = BLOCKS,
    compare_with: Sequence[str] = ("hidden_label", "speaker"),
) -> nn.Module:
    """The fine-tuned student.

    The target data are `data.unlabelled`, or all of `data.train` where there are none; `data.train` has the labels.

    Args:
        student: fresh; its own head is that of the task.
        encoder: trained without labels, e.g. by DeLoRes-M.
        distill, finetune: stages 3 (stream `unlabelled`, view `weak`) and 4 (stream `labelled`, view `weak`).
        clusters, pca, iterations: K, whitened dimensions and k-means iterations of stage 2.
        ce_weight, kl_weight, feature_weight: alpha, beta, gamma; all 0 is plain training on the ids.
        detach_target: see `ClusterDistillation`.
        freeze: fine-tune the head alone.
        layer: of the encoder, whose output is clustered, pooled over time (`blocks.0`: what the official script takes).
        student_layer, exits: last layer and earlier exits of the student.
        compare_with: fields that the clusters are compared with, where the samples have them.

    Raises:
        UserError: a layer is not there, or there are too few different clips for so many clusters.
    """
    target = data.unlabelled if data.unlabelled is not None else data.train.without("label")
    features_ND = ws.compute("features", lambda: {"features": embed(ws, encoder, layer, target)})["features"]
    found = ws.compute(
        "pseudo",
        lambda: {
            "cluster": cluster_labels(features_ND, clusters, dims=pca, iterations=iterations, seed=ws.seed),
            "points": whiten(features_ND, 2),
        },
    )
    measure(ws, target, found["cluster"], found["points"], compare_with)
    example = target.batch(torch.arange(2))[viewed_field(target)]
    method = ClusterDistillation(
        Exits(student, exits, student_layer, clusters, example),
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        feature_weight=feature_weight,
        detach_target=detach_target,
    )
    pseudo = target.with_fields({"cluster": found["cluster"]})
    distilled = ws.fit("distill", method, distill.on(unlabelled=pseudo), distill.trainer).shipped()
    if freeze:
        distilled.requires_grad_(False)
        find_head(distilled)[1].requires_grad_(True)
    streams = finetune.on(labelled=data.train)
    return ws.fit("finetune", CrossEntropy(distilled), streams, finetune.trainer, validation=data.validation).shipped()


def embed(ws: Workspace, encoder: Frozen, layer: str, samples: Samples, batch_size: int = 256) -> Tensor:
    """The encoder's pooled output of that layer for every clean clip: float32 [N,D] on the host."""
    device = torch.device("cpu") if ws.fabric is None else ws.fabric.device
    taps = PooledTaps(encoder.to(device).model, [layer])
    field = viewed_field(samples)
    with torch.no_grad():
        parts = [
            taps(samples.batch(rows)[field].to(device))[0].float().cpu()
            for rows in torch.arange(len(samples)).split(batch_size)
        ]
    return torch.cat(parts)


def measure(ws: Workspace, samples: Samples, cluster_N: Tensor, points_N2: Tensor, compare_with: Sequence[str]) -> None:
    """Normalised mutual information of the clusters with each known field, and the pictures of both."""
    found = {name: samples.fields[name] for name in compare_with if name in samples.fields}
    known = {name.removeprefix("hidden_"): _ids(field) for name, field in found.items()}
    shuffled_N = cluster_N[torch.randperm(len(cluster_N), generator=torch.Generator().manual_seed(ws.seed))]
    ws.measure(
        "clusters",
        lambda: {
            **{f"nmi_{name}": mutual_information(cluster_N, field) for name, field in known.items()},
            **{f"nmi_{name}_by_chance": mutual_information(shuffled_N, field) for name, field in known.items()},
            "largest_share": float(torch.bincount(cluster_N).max() / len(cluster_N)),
        },
    )
    for name, field in {"cluster": cluster_N, **known}.items():
        names = samples.classes if name == "label" else None
        ws.show(f"The encoder's first two components by {name}", Scatter(points_N2, field, names))


def _ids(field: Tensor | Sequence[str]) -> Tensor:
    """Groups as numbers; words are numbered in alphabetic order."""
    if isinstance(field, Tensor):
        return field
    number = {word: place for place, word in enumerate(sorted(set(field)))}
    return torch.tensor([number[word] for word in field])
