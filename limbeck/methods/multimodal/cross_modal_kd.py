"""Cross-modal KD: a student of one modality learns from one frozen teacher of several or of another modality.

What multi-teacher systems are compared with. The teachers learn the task alone; the student then minimises

    w_ce CE(z_S, y) + w_kd mean_m T^2 KL(softmax(z_m / T) || softmax(z_S / T))

over the chosen teachers m: the fused one, the other modality's, both, or none. After Hinton et al. 2015 and, for a
teacher of another modality, Gupta et al.: Cross Modal Distillation for Supervision Transfer, CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from limbeck.data import Data
from limbeck.data.multimodal import require_modalities_of
from limbeck.errors import UserError, require_positive
from limbeck.losses import kl_divergence
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed
from limbeck.train import Batch, Losses, Method, Stage, Workspace

Source = Literal["fused", "other", "average", "none"]


class TaskTraining(Method):
    """Several networks learn the task side by side, each by its own cross-entropy."""

    streams = {"labelled": ("label",)}

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(networks)

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["labelled"]
        return {
            f"ce_{name}": F.cross_entropy(network(fields).float(), fields["label"])
            for name, network in self.members.items()
        }

    def shipped(self) -> nn.Module:
        return next(iter(self.members.values()))


class CrossModalKD(Method):
    """Cross-entropy and the mean of the KD terms from the teachers of a pool; without a pool cross-entropy alone.

    Args:
        student: the batch to logits.
        pool: the frozen teachers; each takes the same batch.
    """

    streams = {"labelled": ("label",)}

    def __init__(
        self,
        student: nn.Module,
        pool: Routed | None,
        *,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.student, self.pool, self.temperature = student, pool, temperature
        self.weights = {"ce": ce_weight, **({} if pool is None else {"kd": kd_weight})}

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["labelled"]
        logits_BC = self.student(fields)
        losses = {"ce": F.cross_entropy(logits_BC.float(), fields["label"])}
        if self.pool is not None:
            targets_MBC = self.pool.stacked({"fields": fields}, "fields")
            terms = [
                kl_divergence(
                    logits_BC, target_BC, temperature=self.temperature, scale_by_t2=True, reduction="batchmean"
                )
                for target_BC in targets_MBC
            ]
            losses["kd"] = torch.stack(terms).mean()
        return losses


def cross_modal_kd(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    fused: nn.Module | None = None,
    other: nn.Module | None = None,
    *,
    pretrain: Stage,
    distill: Stage,
    source: Source = "fused",
    temperature: float = 4.0,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
) -> nn.Module:
    """Train the teachers on the task, then the student with them; returns the student.

    Args:
        student: reads the target modality.
        fused: reads all modalities.
        other: reads another modality.
        source: who teaches: `fused`, `other`, the `average` of both losses, or `none` (no teacher is trained).
        temperature, ce_weight, kd_weight: T, w_ce, w_kd.

    Raises:
        UserError: the source's network is not there, or a modality is missing that one of them reads.
    """
    wanted = {"fused": ("fused",), "other": ("other",), "average": ("fused", "other"), "none": ()}[source]
    given = {"fused": fused, "other": other}
    networks = {name: network for name, network in given.items() if name in wanted and network is not None}
    if len(networks) < len(wanted):
        absent = next(name for name in wanted if name not in networks)
        raise UserError(f"source '{source}' needs the network '{absent}'; add a section '{absent}', or take another")
    require_modalities_of(data, student=student, **networks)
    pool = None
    if networks:
        ws.fit("pretrain", TaskTraining(networks), pretrain.on(labelled=data.train), pretrain.trainer)
        if ws.evaluator is not None:
            evaluate = ws.evaluator
            ws.measure("teachers", lambda: {n: evaluate(each, data.test)["accuracy"] for n, each in networks.items()})
        pool = Routed([Frozen(network) for network in networks.values()], list(networks))
    method = CrossModalKD(student, pool, temperature=temperature, ce_weight=ce_weight, kd_weight=kd_weight)
    ws.fit("distill", method, distill.on(labelled=data.train), distill.trainer, validation=data.validation)
    return student
