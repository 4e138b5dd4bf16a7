"""How much generated images are like real ones: Fréchet and energy distance, coverage of classes, precision and recall.

Shapes: N and M images, D features, C classes, P pixels of an image.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.models import Outputs, SmallCnn, evaluating, split_head
from limbeck.models.diffusion import OdeSampler, Sampler, denoiser_of


def frechet_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """The squared Fréchet distance between the normal laws with the two sets' means and covariances (FID's formula).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), covariances with divisor N - 1, in float64. 0 for equal sets, up to
    rounding. Raises `UserError` for fewer than 2 rows.
    """
    moments = []
    for rows in (first_ND.double(), second_MD.double()):
        if len(rows) < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images on each side, got {len(rows)}")
        moments.append((rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])))
    (mean1, cov1), (mean2, cov2) = moments
    root1 = _root(cov1)
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), so its root's trace needs no complex numbers.
    shared = torch.linalg.eigvalsh(root1 @ cov2 @ root1).clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def energy_distance(first_NP: Tensor, second_MP: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean norms (Székely and Rizzo 2013); 0 only for equal laws.

    All pairs are counted, a row with itself too, so it is never negative and 0 for equal sets. In float64.
    """
    first, second = first_NP.double(), second_MP.double()
    # Without matrix products, which would make the distance of a row to itself the root of rounding errors.
    exact = "donot_use_mm_for_euclid_dist"
    within = [torch.cdist(rows, rows, compute_mode=exact).mean() for rows in (first, second)]
    return float(2 * torch.cdist(first, second, compute_mode=exact).mean() - sum(within))


def class_coverage(classes_N: Tensor, reference_M: Tensor, num_classes: int, least: float = 0.25) -> float:
    """The share of the reference's classes whose share among `classes_N` is at least `least` of what it should be."""
    found_C, wanted_C = (
        torch.bincount(classes, minlength=num_classes) / len(classes) for classes in (classes_N, reference_M)
    )
    present_C = wanted_C > 0
    return float(((found_C >= least * wanted_C) & present_C).sum() / present_C.sum())


def precision_recall(real_ND: Tensor, made_MD: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 to 3).

    Precision: the share of made images within the `neighbours`-th-neighbour ball of some real one; recall the same with
    the roles exchanged. Raises `UserError` where there are not more images than neighbours.
    """
    if min(len(real_ND), len(made_MD)) <= neighbours:
        raise UserError(f"precision and recall over {neighbours} neighbours need at least {neighbours + 1} images")
    real, made = real_ND.double(), made_MD.double()
    return _share_inside(made, real, neighbours), _share_inside(real, made, neighbours)


def _share_inside(points: Tensor, around: Tensor, neighbours: int) -> float:
    radius = torch.cdist(around, around).kthvalue(neighbours + 1).values  # the nearest of all is the point itself
    return float((torch.cdist(points, around) <= radius).any(1).double().mean())


@dataclass(frozen=True)
class FeatureNet:
    """A fixed classifier as the eye of the metrics: features before its head, and the classes that it sees.

    `backbone` gives [N, D], `head` logits [N, C].
    """

    backbone: nn.Module
    head: nn.Linear

    @classmethod
    def of(cls, classifier: nn.Module) -> FeatureNet:
        """Of a classifier with a linear head; it is copied and fixed."""
        return cls(*split_head(copy.deepcopy(classifier).eval().requires_grad_(False)))

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, batch_size: int = 512) -> Outputs:
        """`embedding` [N, D] and `logits` [N, C] on the CPU."""
        device = self.head.weight.device
        embedding = torch.cat([self.backbone(part.to(device)) for part in images_NCHW.split(batch_size)])
        return Outputs(logits=self.head(embedding).cpu(), embedding=embedding.cpu())


def train_feature_net(samples: Samples, *, steps: int = 400, width: int = 16, seed: int = 0) -> FeatureNet:
    """A small convolutional classifier, trained here on real labelled images: the same for the same samples and seed.

    The metrics' features should not change from run to run, so neither the run's seed nor its random state has a part
    in it. Seconds on a CPU for pictures of 8 to 32 pixels; give real work an ImageNet network by `FeatureNet.of`.
    """
    images, labels = real_images(samples), samples.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallCnn(samples.num_classes, images.shape[1], (width, 2 * width))
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = torch.randint(len(images), (64,))
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return FeatureNet.of(net)


def real_images(samples: Samples) -> Tensor:
    """All images of the samples, float32 [N, C, H, W] in [0, 1]."""
    images_NCHW = samples.batch(torch.arange(len(samples)))["image"]
    return images_NCHW.float() / 255 if images_NCHW.dtype == torch.uint8 else images_NCHW


def as_sampler(model: nn.Module) -> Sampler:
    """A sampler as it is; a bare diffusion model with an ODE sampler of 18 steps around it."""
    if isinstance(model, Sampler):
        return model
    denoiser = denoiser_of(model)
    return OdeSampler(denoiser, solver="euler" if denoiser.schedule.ends_in_pure_noise else "heun")


@dataclass(frozen=True)
class GenerationEvaluator:
    """`evaluator(sampler, samples)` compares as many images as `count` says with the real ones in `samples`.

    `energy` on the pixels and, with a feature network, `frechet`, `precision` and `recall` on its features; where there
    are labels, `coverage` of the classes that it sees, and of models with classes `agreement`, the share of images in
    which it sees the class that was asked for. The same noise and labels are drawn for every model.

    Raises:
        UserError: the model makes images of another size than the samples'.
    """

    features: FeatureNet | None = None
    count: int = 1000
    seed: int = 0

    def __call__(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        sampler, real = as_sampler(model), real_images(samples)
        if tuple(real.shape[1:]) != tuple(sampler.image_shape):
            raise UserError(
                f"the model makes images of {list(sampler.image_shape)} and the real ones are {list(real.shape[1:])}; "
                "give data of its size"
            )
        asked = self._labels(sampler, samples)
        with evaluating(sampler):
            made = sampler.sample(self.count, torch.Generator().manual_seed(self.seed), label_B=asked).cpu()
        return self.compare(made, real, asked, samples.fields.get("label"))

    def compare(
        self, made_NCHW: Tensor, real_MCHW: Tensor, asked_N: Tensor | None = None, label_M: Tensor | None = None
    ) -> dict[str, float]:
        """The metrics of images [N, C, H, W] in [0, 1]; `asked_N` are the classes that they were to show."""
        metrics = {"energy": energy_distance(made_NCHW.flatten(1), real_MCHW.flatten(1))}
        if self.features is None:
            return metrics
        seen, truth = self.features(made_NCHW), self.features(real_MCHW)
        assert seen.embedding is not None and truth.embedding is not None and seen.logits is not None
        precision, recall = precision_recall(truth.embedding, seen.embedding)
        frechet = frechet_distance(seen.embedding, truth.embedding)
        metrics = {"frechet": frechet, **metrics, "precision": precision, "recall": recall}
        classes_N = seen.logits.argmax(-1)
        if label_M is not None:
            metrics["coverage"] = class_coverage(classes_N, label_M, seen.logits.shape[-1])
        if asked_N is not None:
            metrics["agreement"] = float((classes_N == asked_N.cpu()).double().mean())
        return metrics

    def _labels(self, sampler: Sampler, samples: Samples) -> Tensor | None:
        """The classes to ask for, as often as they occur among the samples; None for a model without classes."""
        if sampler.num_classes is None or "label" not in samples.fields:
            return None
        rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.seed))
        return samples.labels[rows.repeat(-(-self.count // len(rows)))[: self.count]]
