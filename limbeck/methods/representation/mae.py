"""MAE: a vision transformer sees a quarter of the patches and paints the rest.

He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022.

    L = mean over masked patches of (1/P) |painted - patch|^2

Shapes: B samples, L patches, P numbers of a patch.
"""

from __future__ import annotations

import torch
from torch import nn

from limbeck.errors import require_share
from limbeck.losses import masked_patch_mse
from limbeck.models import MaskedAutoencoder, kept_patches, load_masked_autoencoder, patch_targets, random_masking
from limbeck.train import Batch, Losses, Method


class MAE(Method):
    """Masked autoencoding, which is DMAE without a teacher; trains DMAE's teacher.

    Args:
        student: a `MaskedAutoencoder`.
        mask_ratio: share of patches that are masked, in [0, 1].
        normalize_patches: paint patches of mean 0 and variance 1.

    Raises:
        UserError: the ratio is not in [0, 1], or the student is no masked autoencoder.
    """

    streams = {"unlabelled": ("weak",)}
    epoch_stream = "unlabelled"

    def __init__(self, student: nn.Module, *, mask_ratio: float = 0.75, normalize_patches: bool = False) -> None:
        super().__init__()
        require_share(mask_ratio=mask_ratio)
        self.student: MaskedAutoencoder = load_masked_autoencoder(student)
        self.mask_ratio, self.normalize_patches = mask_ratio, normalize_patches

    def training_step(self, batch: Batch) -> Losses:
        image = batch["unlabelled"]["weak"]
        noise_BL = torch.rand(len(image), self.student.patches, device=image.device)
        keep_BK, restore_BL, mask_BL = random_masking(noise_BL, kept_patches(self.student.patches, self.mask_ratio))
        latent = self.student.latent(self.student.blocks(image, keep_BK)[-1])
        painted_BLP = self.student.decode(latent, restore_BL)
        target_BLP = patch_targets(self.student.to_patches(image), normalize=self.normalize_patches)
        return {"reconstruction": masked_patch_mse(painted_BLP, target_BLP, mask_BL)}
