"""DMAE: a small masked autoencoder that also matches a large one's features on the few visible patches.

Bai, Wang, Xiao, Wei, Yu, Yuille, Zhou, Xie: Masked Autoencoders Enable Efficient Knowledge Distillers, CVPR 2023;
UCSC-VLAA/DMAE, `models_mae_distill.py`.

With the visible patches V, drawn once for both networks, teacher features z_t after block i_t and student features z_s
after block i_s (by default at three quarters of the depth), and a linear head h:

    L_rec   = mean over masked patches of (1/P) |painted - patch|^2
    L_align = mean over samples, tokens and widths of | z_t / |z_t| - h(z_s) / |h(z_s)| |        (class token included)
    L       = L_rec + w L_align,  w = 1

The teacher runs no further than block i_t.

Shapes: B samples, K visible patches, L patches, D widths, P numbers of a patch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data import Data
from limbeck.errors import UserError, require_share
from limbeck.losses import feature_l1, masked_patch_mse
from limbeck.models import (
    MaskedAutoencoder,
    kept_patches,
    load_masked_autoencoder,
    patch_targets,
    random_masking,
    unpatchify,
)
from limbeck.teachers import Frozen
from limbeck.train import Batch, CrossEntropy, Losses, Method, Pictures, Stage, Workspace, linear_probe
from limbeck.train.stage import viewed_field


def dmae(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    teacher: Frozen,
    *,
    pretrain: Stage,
    finetune: Stage,
    probe: Stage | None = None,
    mask_ratio: float = 0.75,
    student_blocks: Sequence[int] | None = None,
    teacher_blocks: Sequence[int] | None = None,
    align_weight: float = 1.0,
    normalize_patches: bool = False,
) -> nn.Module:
    """Pre-training by `DMAE`, then fine-tuning on the labels. Ships the fine-tuned classifier.

    Args:
        student, teacher: masked autoencoders; the teacher is frozen.
        pretrain: stream `unlabelled` with the view `weak`: the unlabelled samples, or the labelled ones where the data
            have no others.
        finetune: stream `labelled` with the view `weak`.
        probe: trains a linear classifier on the pre-trained encoder as it is, which is measured beside.
        mask_ratio, student_blocks, teacher_blocks, align_weight, normalize_patches: of `DMAE`.
    """
    pool = data.train if data.unlabelled is None else data.unlabelled
    method = DMAE(
        student,
        teacher,
        mask_ratio=mask_ratio,
        student_blocks=student_blocks,
        teacher_blocks=teacher_blocks,
        align_weight=align_weight,
        normalize_patches=normalize_patches,
    )
    pretrained = ws.fit("pretrain", method, pretrain.on(unlabelled=pool), pretrain.trainer).student
    ws.show(
        "Test pictures, what the student saw of them, and what it painted",
        Pictures(paint(pretrained, data, mask_ratio)),
    )
    if probe is not None:
        probed = linear_probe(ws, "probe", pretrained, pretrained.width, data, probe)
        ws.measure("linear", lambda: ws.evaluate(probed, data.test))
    classifier = nn.Sequential(copy.deepcopy(pretrained), nn.Linear(pretrained.width, data.num_classes))
    tuning, streams = CrossEntropy(classifier), finetune.on(labelled=data.train)
    return ws.fit("finetune", tuning, streams, finetune.trainer, validation=data.validation).student


class DMAE(Method):
    """Masked autoencoding with feature alignment; see the equations above.

    Args:
        student: a `MaskedAutoencoder`.
        teacher: a frozen one whose pictures have as many patches. It must be live: it sees a mask that the step draws.
        mask_ratio: share of patches that are masked, in [0, 1].
        student_blocks, teacher_blocks: blocks (from 0) whose raw outputs are aligned, pair by pair, each with a head
            of its own; the losses are summed. By default one pair, at three quarters of either depth.
        align_weight: w; 0 is plain masked autoencoding, and the teacher is not run.
        normalize_patches: paint patches of mean 0 and variance 1.

    Raises:
        UserError: blocks that there are not, lists of different length, another number of patches.
    """

    streams = {"unlabelled": ("weak",)}
    epoch_stream = "unlabelled"

    def __init__(
        self,
        student: nn.Module,
        teacher: Frozen,
        *,
        mask_ratio: float = 0.75,
        student_blocks: Sequence[int] | None = None,
        teacher_blocks: Sequence[int] | None = None,
        align_weight: float = 1.0,
        normalize_patches: bool = False,
    ) -> None:
        super().__init__()
        require_share(mask_ratio=mask_ratio)
        self.student: MaskedAutoencoder = load_masked_autoencoder(student)
        self.teacher, known = teacher, load_masked_autoencoder(teacher.model)
        if known.patches != self.student.patches:
            raise UserError(
                f"the teacher cuts a picture into {known.patches} patches and the student into {self.student.patches}; "
                "both must see the same ones: give both the same image_size and patch_size"
            )
        self.student_blocks = _blocks("student", student_blocks, self.student)
        self.teacher_blocks = _blocks("teacher", teacher_blocks, known)
        if len(self.student_blocks) != len(self.teacher_blocks):
            raise UserError(
                f"{len(self.student_blocks)} student_blocks and {len(self.teacher_blocks)} teacher_blocks are aligned "
                "pair by pair; give as many of one as of the other"
            )
        self.heads = nn.ModuleList(nn.Linear(self.student.width, known.width) for _ in self.student_blocks)
        self.mask_ratio, self.normalize_patches = mask_ratio, normalize_patches
        self.weights = {"align": align_weight}

    def training_step(self, batch: Batch) -> Losses:
        image = batch["unlabelled"]["weak"]
        noise_BL = torch.rand(len(image), self.student.patches, device=image.device)
        keep_BK, restore_BL, mask_BL = random_masking(noise_BL, kept_patches(self.student.patches, self.mask_ratio))

        blocks = self.student.blocks(image, keep_BK)
        painted_BLP = self.student.decode(self.student.latent(blocks[-1]), restore_BL)
        target_BLP = patch_targets(self.student.to_patches(image), normalize=self.normalize_patches)
        losses = {"reconstruction": masked_patch_mse(painted_BLP, target_BLP, mask_BL)}
        if self.weights["align"]:
            features = [blocks[number] for number in self.student_blocks]
            losses["align"] = self.alignment(features, self.teacher_features(image, keep_BK))
        return losses

    def teacher_features(self, image_BCHW: Tensor, keep_BK: Tensor) -> list[Tensor]:
        """The teacher's raw block outputs [B,1+K,D_t] on the visible patches; no block behind the last one runs."""
        network: Any = self.teacher.model
        with torch.inference_mode():
            blocks = network.blocks(image_BCHW, keep_BK, last=max(self.teacher_blocks))
        return [blocks[number].clone() for number in self.teacher_blocks]

    def alignment(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The sum over pairs of the mean absolute difference of unit vectors; no gradient to the teacher."""
        return torch.stack(
            [
                feature_l1(
                    head(mine),
                    theirs,
                    normalize_student="l2",
                    normalize_target="l2",
                    reduction="elementmean",
                )
                for head, mine, theirs in zip(self.heads, student, teacher, strict=True)
            ]
        ).sum()


def _blocks(whose: str, asked: Sequence[int] | None, network: MaskedAutoencoder) -> tuple[int, ...]:
    """The blocks that are aligned; by default the one at three quarters of the depth (17 of 24, 8 of 12, from 0)."""
    blocks = tuple(asked) if asked is not None else (max(0, round(0.75 * network.depth) - 1),)
    wrong = [number for number in blocks if not 0 <= number < network.depth]
    if wrong or not blocks:
        raise UserError(
            f"{whose}_blocks is {list(blocks)}; the {whose} has {network.depth} blocks, from 0 to {network.depth - 1}"
        )
    return blocks


@torch.no_grad()
def paint(network: MaskedAutoencoder, data: Data, mask_ratio: float, count: int = 8) -> Tensor:
    """Three rows of pictures [3n,C,H,W]: from the test data, their visible patches, and all patches as painted."""
    image = data.test.batch(torch.arange(min(count, len(data.test))))[viewed_field(data.test)]
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    noise_BL = torch.rand(len(image), network.patches, generator=torch.Generator().manual_seed(0))
    keep_BK, restore_BL, mask_BL = random_masking(noise_BL, kept_patches(network.patches, mask_ratio))
    network = network.eval()
    painted_BLP = network.decode(network.latent(network.blocks(image, keep_BK)[-1]), restore_BL)
    seen_BLP = network.to_patches(image)
    masked_BL1 = mask_BL[:, :, None]
    rows = (seen_BLP * (1 - masked_BL1), seen_BLP * (1 - masked_BL1) + painted_BLP * masked_BL1)
    size = image.shape[-2:]
    return torch.cat([image, *(unpatchify(row, network.patch_size, *size) for row in rows)]).clamp(0, 1)
