"""DHO: one backbone with a head for the labels and a head for the teacher, mixed at inference.

Kang et al.: Simple Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization,
2025 (arXiv 2505.07675).

With h = backbone(x), a = ce_head(h), b = kd_head(h) and teacher logits t, on labelled (l) and unlabelled (u) images:

    L = lambda CE(a_l, y) + (1 - lambda) (KD(b_l, t_l) + KD(b_u, t_u))
    KD(b, t) = T^2 KL(softmax(t / T) || softmax(b / T))
    p = alpha softmax(a) + (1 - alpha) softmax(b / beta)                  (inference)

Both heads' gradients reach the backbone, but neither head sees the other's target, so the two cannot fight in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError, require_positive, require_share
from limbeck.losses import kl_divergence
from limbeck.models import split_head
from limbeck.teachers import Teacher
from limbeck.train import Batch, Fields, Losses, Method

ALPHAS = tuple(i / 20 for i in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


class CosineHead(nn.Linear):
    """scale * (W h / ||h|| + bias): the head of a CLIP-like student; the rows of W are free parameters."""

    scale = 100.0  # CLIP's logit scale

    def forward(self, features_BD: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features_BD, dim=-1), self.weight, self.bias)


class TwoHeads(nn.Module):
    """Backbone and both heads; its logits are the log of the mixed probabilities."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, backbone: nn.Module, ce_head: nn.Linear, kd_head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.ce_head, self.kd_head = backbone, ce_head, kd_head
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("beta", torch.tensor(1.0))

    def forward(self, image: Tensor) -> Tensor:
        features_BD = self.backbone(image)
        if self.ce_head is self.kd_head:
            return self.ce_head(features_BD)
        return mix(self.ce_head(features_BD), self.kd_head(features_BD), self.alpha, self.beta)


def mix(a_BC: Tensor, b_BC: Tensor, alpha: Tensor | float, beta: Tensor | float) -> Tensor:
    """log(alpha softmax(a) + (1 - alpha) softmax(b / beta)): probabilities are mixed, only b is sharpened."""
    p_BC = alpha * a_BC.float().softmax(-1) + (1 - alpha) * (b_BC.float() / beta).softmax(-1)
    return p_BC.clamp(min=torch.finfo(p_BC.dtype).tiny).log()


class DHO(Method):
    """Few labels, many unlabelled images and a frozen teacher, without a tug-of-war over one head.

    `alpha` and `beta` are chosen by accuracy on the validation data before each evaluation, over the paper's grid; give
    numbers to fix them (on ImageNet the paper takes alpha 0.4 with a zero-shot teacher, 0.2 with a few-shot one, 0.5
    with 1 % or 10 % of the labels, and beta 0.5).

    Args:
        student: inputs to logits [B, C]; it is taken apart in place: its last linear layer becomes the head for the
            labels, and the teacher's head is a new one of the same shape and size of weights.
        teacher: gives logits [B, C] (CLIP: 100 x cosine similarity).
        temperature: T > 0.
        ce_weight: lambda in [0, 1].
        heads: 2, or 1 for the single-head baseline of the same loss; then kd_head, alpha and beta mean nothing.
        kd_head: `linear`, or `cosine` for a CLIP-like student.
        class_embeddings: text embeddings [C, D] that both heads start from, with zero bias.
        joint_forward: labelled and unlabelled images in one batch (CLIP-like students) instead of one after the other.
        alpha, beta: None to choose them on validation data.
        measure_conflict: log the cosine between both losses' gradients on the backbone at each epoch's first step.

    Raises:
        UserError: a setting is out of its range, alpha and beta are not given together, class embeddings do not fit the
            heads, or the student has no final linear layer.
    """

    student: TwoHeads

    streams = {"labelled": ("weak", "label"), "unlabelled": ("weak",)}
    epoch_stream = "unlabelled"  # the official loop stops at the shorter stream: with few labels, after a few steps

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        temperature: float = 2.0,
        ce_weight: float = 0.5,
        heads: Literal[1, 2] = 2,
        kd_head: Literal["linear", "cosine"] = "linear",
        class_embeddings: Tensor | None = None,
        joint_forward: bool = False,
        alpha: float | None = None,
        beta: float | None = None,
        measure_conflict: bool = False,
    ) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        require_share(ce_weight=ce_weight)
        if (alpha is None) != (beta is None):
            raise UserError(f"alpha and beta are fixed or chosen together; got alpha={alpha}, beta={beta}")
        backbone, ce_head = split_head(student)
        kd_module = second_head(ce_head, kd_head) if heads == 2 else ce_head
        self.student = TwoHeads(backbone, ce_head, kd_module)
        if class_embeddings is not None:
            start_heads((ce_head, kd_module), class_embeddings)
        self.teacher = teacher
        self.temperature, self.joint_forward, self.measure_conflict = temperature, joint_forward, measure_conflict
        self.weights = {"ce": ce_weight, "kd_labelled": 1 - ce_weight, "kd_unlabelled": 1 - ce_weight}
        self.tuned = alpha is None and heads == 2
        if alpha is not None and beta is not None:
            self.student.alpha.fill_(alpha)
            self.student.beta.fill_(beta)

    def networks(self) -> list[nn.Module]:
        return list(self.student.children())

    def training_step(self, batch: Batch) -> Losses:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        features_l, features_u = self._features(labelled["weak"], unlabelled["weak"])
        losses = {
            "ce": F.cross_entropy(self.student.ce_head(features_l).float(), labelled["label"]),
            "kd_labelled": self._kd(features_l, labelled),
            "kd_unlabelled": self._kd(features_u, unlabelled),
        }
        if self.measure_conflict and self.clock.step % self.clock.steps_per_epoch == 0:
            self.log(gradient_cosine=self._conflict(losses))
        return losses

    def _features(self, labelled: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self.student.backbone
        if not self.joint_forward:
            return backbone(labelled), backbone(unlabelled)
        both = backbone(torch.cat([labelled, unlabelled]))
        return both[: len(labelled)], both[len(labelled) :]

    def _kd(self, features: Tensor, fields: Fields) -> Tensor:
        return kl_divergence(
            self.student.kd_head(features),
            self.teacher.logits(fields, "weak"),
            temperature=self.temperature,
            scale_by_t2=True,
            reduction="batchmean",
        )

    def _conflict(self, losses: Losses) -> Tensor:
        """Cosine between the gradients of CE and KD on the backbone: negative where they pull against each other."""
        weights = [p for p in self.student.backbone.parameters() if p.requires_grad]
        pulls = []
        for loss in (losses["ce"], losses["kd_labelled"] + losses["kd_unlabelled"]):
            # A layer that the student holds but does not use (a pooler) counts as zero.
            gradients = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            pulls.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return F.cosine_similarity(pulls[0], pulls[1], dim=0)

    @torch.no_grad()
    def tune(self, validation: Iterable[Fields]) -> None:
        """Pick (alpha, beta) by validation accuracy: beta in the outer loop, the first best pair stays."""
        if not self.tuned:
            return
        heads, labels = [], []
        for fields in validation:
            features_BD = self.student.backbone(fields["weak"])
            heads.append((self.student.ce_head(features_BD), self.student.kd_head(features_BD)))
            labels.append(fields["label"])
        if not heads:
            return
        a_NC, b_NC = (torch.cat(logits) for logits in zip(*heads, strict=True))
        alpha, beta = best_mix(a_NC, b_NC, torch.cat(labels))
        self.student.alpha.copy_(alpha)
        self.student.beta.copy_(beta)


def best_mix(a_NC: Tensor, b_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The pair (alpha, beta) of the grid with the highest accuracy, float32 [2]; of equal ones the first, as above."""
    pairs_P2 = torch.tensor([(alpha, beta) for beta in BETAS for alpha in ALPHAS], device=a_NC.device)
    right_P = torch.stack([(mix(a_NC, b_NC, *pair).argmax(-1) == labels_N).sum() for pair in pairs_P2])
    return pairs_P2[right_P.argmax()]  # argmax gives the first of equal maxima


def second_head(first: nn.Linear, kind: Literal["linear", "cosine"]) -> nn.Linear:
    """A head of the same shape drawn anew, with weights of the size that the first one's have and zero bias.

    With torch's default initialisation, which is smaller than that of most networks, the teacher's head would start
    behind the one head of the baseline.
    """
    bias = first.bias is not None
    head = (CosineHead if kind == "cosine" else nn.Linear)(first.in_features, first.out_features, bias=bias)
    nn.init.normal_(head.weight, std=float(first.weight.detach().std()))
    if bias:
        nn.init.zeros_(head.bias)
    return head


def start_heads(heads: Iterable[nn.Linear], class_embeddings_CD: Tensor) -> None:
    """Let each head start from the embeddings of the classes' names, with zero bias."""
    for head in heads:
        if class_embeddings_CD.shape != head.weight.shape:
            raise UserError(
                f"class_embeddings has shape {list(class_embeddings_CD.shape)}, but the heads have [classes, width] = "
                f"{list(head.weight.shape)}; give one row a class"
            )
        head.weight.data.copy_(class_embeddings_CD)
        if head.bias is not None:
            head.bias.data.zero_()
