"""MST-Distill: a network of one modality learns from teachers of several, each specialised by a mask, one a sample.

Li et al.: MST-Distill: Mixture of Specialized Teachers for Cross-Modal Knowledge Distillation, ACM Multimedia 2025
(arXiv 2507.07015).

T(x1, x2) is the multimodal teacher, A(x_other) that of the other modality, S(x_target) the student, and
KD(p <- q) = T^2 KL(softmax(q / T) || softmax(p / T)), summed over classes, mean over the batch (and positions):

    1. co-train:     L = sum_i [CE_i + sum_{j != i} KD(i <- j)] over i, j in {T, A, S}, gradient through q as well
    2. specialise:   for each masked layer alone, T, A and S fixed: KD(masked teacher <- S) trains the mask
    3. distil:       g = softmax(gate(z_S)), i_1..i_k = top-k of g a sample;
                     L = w_ce CE(z_S, y) + w_kd (1/k) sum_r KD(z_S <- z_{i_r}) + w_lb (1/M) KL(u || mean_b g)

with M specialised teachers (a frozen teacher with exactly one mask each), u uniform, and w_lb x 0.9 at the end of every
10th epoch, w_kd x 0.5 at that of every 30th, from the first one on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Data, Samples
from limbeck.data.multimodal import require_modalities_of
from limbeck.distributed import gather_with_gradient
from limbeck.errors import UserError, require_positive
from limbeck.losses import kl_divergence
from limbeck.losses.balance import balance_cv, balance_kl
from limbeck.models import Taps
from limbeck.models.masks import Masked, mask_for, masked
from limbeck.models.moe import DenseGateNet, GateNet, shares, top_k
from limbeck.teachers import Frozen
from limbeck.teachers.routed import Routed
from limbeck.train import Bars, Batch, Fields, Losses, Method, Stage, Trainer, Workspace
from limbeck.train.reading import batches

Truth = Literal["label", "mask"]

kd = partial(kl_divergence, scale_by_t2=True, reduction="mean", dim=1)  # of logits [B,C] and [B,C,H,W]


def decayed(weight: float, factor: float, every: int, epoch: int) -> float:
    """The weight in this epoch (from 0), multiplied by `factor` at the end of the epochs 0, `every`, 2 `every`, ..."""
    return weight * factor ** -(-epoch // every)


class CoTraining(Method):
    """Stage 1: all three learn the task and each learns from the other two, by one optimiser."""

    def __init__(
        self, student: nn.Module, fused: nn.Module, other: nn.Module, temperature: float = 4.0, truth: Truth = "label"
    ) -> None:
        super().__init__()
        self.student, self.fused, self.other = student, fused, other
        self.temperature, self.truth = temperature, truth
        self.streams = {"labelled": (truth,)}

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["labelled"]
        logits = {"fused": self.fused(fields), "other": self.other(fields), "student": self.student(fields)}
        losses = {f"ce_{name}": task_loss(z, fields, self.truth) for name, z in logits.items()}
        for name, z in logits.items():
            # The target is not detached: a teacher also moves to where the others can follow it (as the code does).
            losses[f"kd_{name}"] = sum(
                (kd(z, target, temperature=self.temperature) for who, target in logits.items() if who != name),
                start=z.new_zeros(()),
            )
        return losses


class Specialising(Method):
    """Stage 2: each mask alone, by its own optimiser, makes its teacher say what the student can express."""

    streams = {"labelled": ()}

    def __init__(
        self,
        student: Frozen,
        teachers: Mapping[str, Frozen],
        masks: Mapping[tuple[str, str], nn.Module],
        temperature: float = 4.0,
    ) -> None:
        super().__init__()
        self.guide, self.frozen, self.temperature = student, dict(teachers), temperature
        self.places = list(masks)
        self.masks = nn.ModuleList(masks.values())

    def teachers(self) -> dict[str, Any]:
        return {"guide": self.guide, **self.frozen}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {part_name(place): list(mask.parameters()) for place, mask in zip(self.places, self.masks, strict=True)}

    def training_step(self, batch: Batch) -> Iterator[tuple[str, Losses]]:
        fields = batch["labelled"]
        target_BC = self.guide.logits({"fields": fields}, "fields")
        for number, place in enumerate(self.places):
            part = part_name(place)
            yield part, {f"kd_{part}": self.divergence(self.masks[number], place, fields, target_BC)}

    def divergence(self, mask: nn.Module, place: tuple[str, str], fields: Fields, target_BC: Tensor) -> Tensor:
        """KD(teacher with this one mask <- student)."""
        teacher, layer = place
        model = self.frozen[teacher].model
        with masked(model, layer, mask):
            return kd(model(fields), target_BC, temperature=self.temperature)

    def shipped(self) -> nn.ModuleList:
        return self.masks

    @torch.no_grad()
    def evaluate(self, masks: nn.Module, samples: Samples) -> dict[str, float]:
        """`kd`: the mean over the first teacher's masks plus the mean over the second's, of all samples."""
        device = next(masks.parameters()).device
        totals = torch.zeros(len(self.places), device=device)
        for fields in batches(samples, device):
            target_BC = self.guide.logits({"fields": fields}, "fields")
            rows = len(target_BC)
            for number, (place, mask) in enumerate(zip(self.places, masks.children(), strict=True)):
                totals[number] += rows * self.divergence(mask, place, fields, target_BC)
        of_teacher = {name: [n for n, place in enumerate(self.places) if place[0] == name] for name in self.frozen}
        means = (totals / len(samples)).tolist()
        return {"kd": sum(sum(means[n] for n in numbers) / len(numbers) for numbers in of_teacher.values() if numbers)}


class RoutedDistillation(Method):
    """Stage 3: student and gate learn; per sample the gate says which k specialised teachers the student imitates.

    Args:
        student: the batch to logits z_S.
        gate: z_S to M gate logits. The picks are discrete, so the gate learns by the load balance alone; and z_S is not
            detached, so the load balance also moves the student.
        pool: the M specialised teachers.
        k: teachers a sample imitates.
        balance: `kl`, KL(u || mean gate) / M, or `cv`, the coefficient of variation of the gates' sums.
        kd_decay, balance_decay: factor and number of epochs between two decays.
    """

    def __init__(
        self,
        student: nn.Module,
        gate: nn.Module,
        pool: Routed,
        *,
        k: int = 1,
        temperature: float = 4.0,
        balance: Literal["kl", "cv"] = "kl",
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        balance_weight: float = 1.0,
        kd_decay: tuple[float, int] = (0.5, 30),
        balance_decay: tuple[float, int] = (0.9, 10),
        truth: Truth = "label",
    ) -> None:
        super().__init__()
        if not 1 <= k <= len(pool):
            raise UserError(f"k is {k}, but there are {len(pool)} specialised teachers; give 1 to {len(pool)}")
        self.student, self.gate, self.pool = student, gate, pool
        self.k, self.temperature, self.balance, self.truth = k, temperature, balance, truth
        self.streams = {"labelled": (truth,)}
        self.starts = {"kd": (kd_weight, *kd_decay), "balance": (balance_weight, *balance_decay)}
        self.weights = {"ce": ce_weight, "kd": kd_weight, "balance": balance_weight}

    def training_step(self, batch: Batch) -> Losses:
        fields = batch["labelled"]
        logits_BC = self.student(fields)
        gate_BM = self.gate(logits_BC)
        index_BK = top_k(gate_BM, self.k).index_BK
        picked_KBC = self.pool.picked({"fields": fields}, "fields", index_BK)
        distances = [kd(logits_BC, target_BC, temperature=self.temperature) for target_BC in picked_KBC]
        # The mean gate is that of the batch over all processes.
        whole_BM = gather_with_gradient(gate_BM)
        self.weights |= {term: decayed(*start, self.clock.epoch) for term, start in self.starts.items()}
        self.log(**{f"route_{n}": s for n, s in zip(self.pool.names, shares(index_BK, len(self.pool)), strict=True)})
        return {
            "ce": task_loss(logits_BC, fields, self.truth),
            "kd": torch.stack(distances).mean(),
            "balance": (
                balance_kl(whole_BM, uniform_first=True, mean=True) if self.balance == "kl" else balance_cv(whole_BM)
            ),
        }

    @torch.no_grad()
    def evaluate(self, student: nn.Module, samples: Samples) -> dict[str, float]:
        """`task_loss`: the cross-entropy by which the best epoch is chosen."""
        total = torch.zeros((), device=next(student.parameters()).device)
        for fields in batches(samples, total.device):
            total += len(fields["index"]) * task_loss(student(fields), fields, self.truth)
        return {"task_loss": float(total) / len(samples)}

    @torch.no_grad()
    def routing(self, samples: Samples) -> dict[str, float]:
        """Which share of the picks each specialised teacher gets on these samples, and the `largest` share."""
        device = next(self.gate.parameters()).device
        index = torch.cat([top_k(self.gate(self.student(f)), self.k).index_BK for f in batches(samples, device)])
        share = dict(zip(self.pool.names, shares(index, len(self.pool)).tolist(), strict=True))
        return {**share, "largest": max(share.values())}


def mst_distill(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    fused: nn.Module,
    other: nn.Module,
    *,
    cotrain: Stage,
    specialise: Stage,
    distill: Stage,
    other_layers: Sequence[str],
    fused_layers: Sequence[str] = ("fusion", "hidden"),
    temperature: float = 4.0,
    heads: int = 3,
    width_factor: int = 2,
    rank: int | None = None,
    k: int = 1,
    balance: Literal["kl", "cv"] = "kl",
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    balance_weight: float = 1.0,
    kd_decay: tuple[float, int] = (0.5, 30),
    balance_decay: tuple[float, int] = (0.9, 10),
    truth: Truth = "label",
) -> nn.Module:
    """Train a student of one modality on samples of several; returns the student of the best validation loss.

    Args:
        student: reads the target modality; S.
        fused: reads all modalities; T.
        other: reads another modality; A.
        other_layers, fused_layers: the layers that get a mask, by module name; one specialised teacher each.
        temperature: T of every KD.
        heads, width_factor, rank: of the masks, see `MaskNet`.
        k, balance, ce_weight, kd_weight, balance_weight, kd_decay, balance_decay: see `RoutedDistillation`.
        truth: `label` of samples, or `mask` of pixels (255 is ignored).

    Raises:
        UserError: a modality that one of the networks reads is missing somewhere, no layer or an unknown one is named,
            or a number is out of its range.
    """
    require_positive(temperature=temperature)
    require_modalities_of(data, student=student, fused=fused, other=other)
    networks, layers = {"fused": fused, "other": other}, {"fused": fused_layers, "other": other_layers}
    example = next(iter(batches(data.train.select([0, 1]))))
    masks: dict[tuple[str, str], nn.Module] = {}
    for name, network in networks.items():
        with torch.no_grad():
            seen = Taps(network.eval(), layers[name])(example)
        for layer, feature in seen.features.items():
            masks[name, layer] = mask_for(feature, heads=heads, width_factor=width_factor, rank=rank)
    assert seen.logits is not None
    gate = (DenseGateNet if seen.logits.ndim == 4 else GateNet)(seen.logits.shape[1], len(masks))

    ws.fit(
        "cotrain",
        CoTraining(student, fused, other, temperature, truth),
        cotrain.on(labelled=data.train),
        cotrain.trainer,
    )
    frozen = {name: Frozen(network) for name, network in networks.items()}
    specialising = Specialising(Frozen(copy.deepcopy(student)), frozen, masks, temperature)
    ws.fit(
        "specialise",
        specialising,
        specialise.on(labelled=data.train),
        best_by("kd", specialise.trainer, data.validation),
        validation=data.validation,
        evaluator=specialising.evaluate,
    )
    specialised = [Frozen(Masked(networks[name], layer, mask)) for (name, layer), mask in masks.items()]
    pool = Routed(specialised, [part_name(place) for place in masks])
    if ws.evaluator is not None and truth == "label":
        shown = {**networks, **{name: teacher.model for name, teacher in zip(pool.names, specialised, strict=True)}}
        evaluate = ws.evaluator
        ws.measure("teachers", lambda: {name: evaluate(model, data.test)["accuracy"] for name, model in shown.items()})
    routed = RoutedDistillation(
        student,
        gate,
        pool,
        k=k,
        temperature=temperature,
        balance=balance,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        balance_weight=balance_weight,
        kd_decay=kd_decay,
        balance_decay=balance_decay,
        truth=truth,
    )
    ws.fit(
        "distill",
        routed,
        distill.on(labelled=data.train),
        best_by("task_loss", distill.trainer, data.validation),
        validation=data.validation,
        evaluator=routed.evaluate,
    )
    found = ws.measure("routing", lambda: routed.routing(data.train))
    ws.show("Which specialised teacher the training samples go to", Bars({name: found[name] for name in pool.names}))
    return student


def task_loss(logits: Tensor, fields: Fields, truth: Truth) -> Tensor:
    """Cross-entropy with the samples' labels, or with the pixels' classes where these are known (not 255)."""
    if truth == "label":
        return F.cross_entropy(logits.float(), fields["label"])
    return F.cross_entropy(logits.float(), fields["mask"].long(), ignore_index=255)


def part_name(place: tuple[str, str]) -> str:
    """(teacher, layer) as one word, for parts and logged values."""
    return "_".join(place).replace(".", "_")


def best_by(metric: str, trainer: Trainer, validation: Samples | None) -> Trainer:
    """The trainer that keeps the epoch of the smallest `metric`, where there is validation data to measure it on."""
    return trainer if validation is None else replace(trainer, select=metric, select_mode="min")
