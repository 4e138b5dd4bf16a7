"""FST: the teacher absorbs students of the future, and its labels train the student of today.

Du et al.: Learning from Future: A Novel Self-Training Framework for Semantic Segmentation, NeurIPS 2022
(arXiv 2209.06993).

With theta the student, phi <- a phi + (1 - a) theta its moving average, B a batch and
L(theta; phi, B) = L_supervised + lambda L_pseudo, labelled by phi, an iteration is

    mean teacher (K = 0):   theta <- step L(theta; phi, B);  update phi
    FST-D (deep):           S = theta;  K times on B: {update phi;  theta <- step L(theta; phi, B)};  update phi;
                            theta = S;  theta <- step L(theta; phi, B);  with flavour ssl: update phi
    FST-W (wide):           S = theta;  for each of K future batches: theta~_i <- step L(S; phi, B_i);
                            update phi with the mean of all theta~_i;  theta = S;
                            theta <- step L(theta; phi, B);  update phi

The teacher is never rolled back. What ships is the teacher, whose mIoU is what the paper reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.data import Photometric, Stream, box_mix, class_mask, paste
from limbeck.errors import UserError, require_share
from limbeck.labels import confident_share, drop_uncertain, hard_mask, mask_accuracy
from limbeck.losses import pixel_cross_entropy
from limbeck.models import require_classes, with_batch_statistics
from limbeck.teachers import EMA
from limbeck.train import Batch, Losses, Method, Snapshot, Soup

Flavour = Literal["ssl", "uda"]
IGNORE = 255
# What DACS does to mixed pictures; sigma in pixels.
RECOLOUR = Photometric(
    (0.2, 0.2, 0.2), hue=0.2, jitter_probability=0.8, grey=0, blur=0.5, sigma=(0.15, 1.15), erasing=()
)


def renormalized_cross_entropy(logits_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Mean cross-entropy over the kept pixels, times all pixels over the kept ones (so a factor above 1).

    0 where no pixel is kept. Source: `compute_unsupervised_loss` of the official code.
    """
    kept = (mask_BHW != IGNORE).sum().clamp(min=1)
    return pixel_cross_entropy(logits_BCHW, mask_BHW, reduction="mean") * (mask_BHW.numel() / kept)


class FST(Method):
    """Mean-teacher self-training of a segmenter with K virtual steps ahead of each real one.

    Each stream's batch is one iteration's; FST-W splits it into K + 1 equal groups, the current one and K of the
    future. With `accumulate` in the trainer the teacher would move once for every accumulated batch: leave it at 1.

    Args:
        student: pictures to logits [B, C, H, W].
        flavour: `ssl` (labelled and unlabelled pictures, CutMix, entropy filter) or `uda` (the stream `labelled` is the
            source domain, `unlabelled` the target; ClassMix, confidence weight).
        look_ahead: `deep` (FST-D) or `wide` (FST-W).
        ahead_steps: K; 0 is the plain mean teacher.
        ema_decay: alpha; None: 0.99 for ssl, 0.999 for uda.
        ema_counter: the t of a_t = min(1 - 1 / (t + 1), alpha): `iteration` (None with ssl), `forward`, which counts
            virtual forward passes too (None with uda), or `constant`: a_t = alpha.
        rollback_optimizer: roll the optimiser's state back with the parameters. The paper speaks of gradients that are
            cached and not applied; the released code keeps the state, and so does the default.
        pseudo_weight: lambda.
        supervised_epochs: epochs of labels alone before self-training (ssl).
        follow_epochs: epochs after them in which the teacher is the student at every call; None: 1 for ssl, as the
            released script has it, 0 for uda.
        drop_percent: ssl: 80 drops the 20 % of pixels with the highest teacher's entropy.
        mix_probability: ssl: of CutMix among the unlabelled pictures of a batch.
        threshold: uda: confidence whose share among the target's pixels is the weight of all of them.
        ignore_rows: uda: rows at the top and bottom of target pictures with weight 0; (15, 120) for Cityscapes.

    Raises:
        UserError: a setting is out of range, or belongs to the other flavour; the masks have other classes than the
            student; FST-W's batches do not split into K + 1 groups.
    """

    streams = {"labelled": ("weak", "weak_mask"), "unlabelled": ("weak",)}
    epoch_stream = "unlabelled"

    def __init__(
        self,
        student: nn.Module,
        *,
        flavour: Flavour = "ssl",
        look_ahead: Literal["deep", "wide"] = "deep",
        ahead_steps: int = 3,
        ema_decay: float | None = None,
        ema_counter: Literal["iteration", "forward", "constant"] | None = None,
        rollback_optimizer: bool = False,
        pseudo_weight: float = 1.0,
        supervised_epochs: int = 0,
        follow_epochs: int | None = None,
        drop_percent: float = 80.0,
        mix_probability: float = 0.5,
        threshold: float = 0.968,
        ignore_rows: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        ssl = flavour == "ssl"
        alpha = (0.99 if ssl else 0.999) if ema_decay is None else ema_decay
        require_share(ema_decay=alpha, mix_probability=mix_probability, threshold=threshold)
        if ahead_steps < 0 or not 0 <= drop_percent <= 100:
            raise UserError(f"Got ahead_steps={ahead_steps}, drop_percent={drop_percent}; give >= 0 and 0 to 100")
        if not ssl and supervised_epochs:
            raise UserError("supervised_epochs belongs to flavour ssl; train on the source first to warm uda up")
        self.student = student
        self.counter = ema_counter or ("iteration" if ssl else "forward")
        self.ema = EMA(student, alpha, warmup=False if self.counter == "constant" else "mean", buffers="keep")
        self.flavour, self.look_ahead, self.ahead_steps = flavour, look_ahead, ahead_steps
        self.rollback_optimizer = rollback_optimizer
        self.weights = {"pseudo": pseudo_weight}
        self.supervised_epochs = supervised_epochs
        self.follow_epochs = int(ssl) if follow_epochs is None else follow_epochs
        self.drop_percent, self.mix_probability = drop_percent, mix_probability
        self.threshold, self.ignore_rows = threshold, ignore_rows
        self.forwards = 0

    def prepare(self, streams: Mapping[str, Stream]) -> None:
        require_classes(self.student, streams["labelled"].samples.num_classes)
        for name, stream in streams.items():
            if self.look_ahead == "wide" and stream.batch_size % (self.ahead_steps + 1):
                raise UserError(
                    f"FST-W takes {self.ahead_steps + 1} groups from a batch of '{name}' (the current one and "
                    f"{self.ahead_steps} of the future), got {stream.batch_size} samples; give a multiple"
                )

    def training_step(self, batch: Batch) -> Iterator[tuple[str, Losses]]:
        now, *future = self._groups(batch)
        self.forwards = self._forwards_before()
        if self.ahead_steps == 0 or self._only_labels() or (self.flavour == "uda" and self.clock.step == 0):
            yield "student", self._losses(now, real=True)
            self._update_teacher()
            return

        optimizer = self.optimizers["student"] if self.rollback_optimizer else None
        today = Snapshot(self.student, optimizer=optimizer)
        if self.look_ahead == "deep":
            for _ in range(self.ahead_steps):
                self._update_teacher()
                yield "student", self._losses(now)
        else:
            soup = Soup()
            for number, group in enumerate(future):
                if number:
                    today.restore()
                yield "student", self._losses(group)
                soup.add(self.student)
            soup.pour(self.student)
        self._update_teacher()
        today.restore()
        yield "student", self._losses(now, real=True)
        if self.look_ahead == "wide" or self.flavour == "ssl":
            self._update_teacher()

    def _losses(self, batch: Batch, *, real: bool = False) -> Losses:
        self.forwards += 1
        if self._only_labels():
            return self._supervised(batch)
        if self.supervised_epochs <= self.clock.epoch < self.supervised_epochs + self.follow_epochs:
            self._copy_student()
        return self._ssl(batch, real) if self.flavour == "ssl" else self._uda(batch, real)

    def _ssl(self, batch: Batch, real: bool) -> Losses:
        labelled, images_UCHW = batch["labelled"], batch["unlabelled"]["weak"]
        teacher = self.ema.model
        with torch.no_grad():
            pseudo_UHW = hard_mask(teacher.eval()(images_UCHW).float().softmax(1))
        self._log_accuracy(pseudo_UHW, batch, real)
        mix = box_mix(len(images_UCHW), images_UCHW.shape[-2:], device=images_UCHW.device)
        mix = mix.only(torch.rand(1, device=images_UCHW.device) < self.mix_probability)  # the whole batch or none of it
        together = torch.cat([labelled["weak"], mix.pixels(images_UCHW)])
        logits_BCHW, logits_UCHW = self.student(together).float().tensor_split([len(labelled["weak"])])
        with torch.no_grad():  # in train mode, which also feeds the BatchNorm statistics of the next labels
            certain_UCHW = teacher.train()(together)[len(logits_BCHW) :].float().softmax(1)
        target_UHW = drop_uncertain(mix.pixels(pseudo_UHW), certain_UCHW, self.drop_percent)
        return {
            "ce": pixel_cross_entropy(logits_BCHW, labelled["weak_mask"], reduction="mean"),
            "pseudo": renormalized_cross_entropy(logits_UCHW, target_UHW),
        }

    def _uda(self, batch: Batch, real: bool) -> Losses:
        source, target_BCHW = batch["labelled"], batch["unlabelled"]["weak"]
        truth_BHW = source["weak_mask"].long()
        with torch.no_grad():
            probabilities_BCHW = with_batch_statistics(self.ema.model)(target_BCHW).float().softmax(1)
        pseudo_BHW = hard_mask(probabilities_BCHW)
        self._log_accuracy(pseudo_BHW, batch, real)
        weight_BHW = confident_share(probabilities_BCHW, self.threshold).expand(pseudo_BHW.shape).clone()
        top, bottom = self.ignore_rows
        weight_BHW[:, :top] = 0
        weight_BHW[:, pseudo_BHW.shape[1] - bottom :] = 0
        pasted_BHW = class_mask(truth_BHW, of="batch")
        mixed_BCHW = RECOLOUR(paste(pasted_BHW, source["weak"], target_BCHW))
        # As in mmsegmentation of that time, both means are over all pixels, ignored ones too.
        return {
            "ce": pixel_cross_entropy(self.student(source["weak"]), truth_BHW, reduction="mean", count_ignored=True),
            "pseudo": pixel_cross_entropy(
                self.student(mixed_BCHW),
                paste(pasted_BHW, truth_BHW, pseudo_BHW),
                weight=paste(pasted_BHW, torch.ones_like(weight_BHW), weight_BHW),
                reduction="mean",
                count_ignored=True,
            ),
        }

    def _supervised(self, batch: Batch) -> Losses:
        images, mask_BHW = batch["labelled"]["weak"], batch["labelled"]["weak_mask"]
        with torch.no_grad():
            self.ema.model.train()(images)  # only for its BatchNorm statistics
        return {"ce": pixel_cross_entropy(self.student(images), mask_BHW, reduction="mean")}

    def _update_teacher(self) -> None:
        steps = self.clock.step - self.supervised_epochs * self.clock.steps_per_epoch
        self.ema.update(self.student, self.forwards if self.counter == "forward" else max(0, steps))

    @torch.no_grad()
    def _copy_student(self) -> None:
        ours, theirs = ([p.detach() for p in network.parameters()] for network in (self.ema.model, self.student))
        torch._foreach_copy_(ours, theirs)

    def _forwards_before(self) -> int:
        """Forward passes before this iteration: the first one of uda looks not ahead."""
        plain = int(self.flavour == "uda" and self.clock.step > 0)
        return plain + (self.clock.step - plain) * (self.ahead_steps + 1)

    def _only_labels(self) -> bool:
        return self.clock.epoch < self.supervised_epochs

    def _groups(self, batch: Batch) -> list[Batch]:
        """The current batch and, with FST-W, the K future ones: equal parts of each stream's rows."""
        if self.look_ahead == "deep":
            return [batch]
        parts = self.ahead_steps + 1
        split = {
            stream: {name: value.chunk(parts) for name, value in fields.items() if isinstance(value, Tensor)}
            for stream, fields in batch.items()
        }
        return [{s: {n: v[i] for n, v in fields.items()} for s, fields in split.items()} for i in range(parts)]

    def _log_accuracy(self, pseudo_UHW: Tensor, batch: Batch, real: bool) -> None:
        """How good the labels of the real step are, where the data keep the truth to measure by."""
        truth_UHW = batch["unlabelled"].get("weak_hidden_mask")
        if real and truth_UHW is not None:
            self.log(pseudo_accuracy=mask_accuracy(pseudo_UHW, truth_UHW))

    def shipped(self) -> nn.Module:
        return self.ema.model
