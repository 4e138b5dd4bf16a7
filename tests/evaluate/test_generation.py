"""Distances between image sets against closed forms, and the evaluator of generators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate.generation import (
    FeatureNet,
    GenerationEvaluator,
    class_coverage,
    energy_distance,
    frechet_distance,
    precision_recall,
    real_images,
    train_feature_net,
)
from limbeck.models.diffusion import DenoisingMlp, EDMDenoiser, FewStepSampler, Sampler


def rows(count: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(points: Tensor, mean: Tensor, deviations: Tensor) -> Tensor:
    """The points moved so that their mean and (diagonal) covariance are exactly these."""
    centred = points - points.mean(0)
    root = torch.linalg.cholesky(torch.linalg.inv(torch.cov(centred.T)))
    return centred @ root * deviations + mean


def test_frechet_distance_of_diagonal_normals_is_the_closed_form():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, -1.0]).double()
    s1, s2 = torch.tensor([1.0, 0.5, 2.0]).double(), torch.tensor([1.0, 2.0, 0.1]).double()
    found = frechet_distance(exactly(rows(50, 3), mean1, s1), exactly(rows(80, 3, 1), mean2, s2))
    assert found == pytest.approx(float((mean1 - mean2).square().sum() + (s1 - s2).square().sum()))


def test_frechet_distance_of_general_covariances_is_scipy_s():
    linalg = pytest.importorskip("scipy.linalg")
    first, second = rows(40, 4) @ rows(4, 4, 2), rows(60, 4, 1) @ rows(4, 4, 3) + 1
    cov1, cov2 = torch.cov(first.T).numpy(), torch.cov(second.T).numpy()
    root = linalg.sqrtm(cov1 @ cov2).real
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + (cov1 + cov2 - 2 * root).trace()
    assert frechet_distance(first, second) == pytest.approx(expected)


def test_equal_sets_have_no_distance():
    same = rows(20, 5)
    assert frechet_distance(same, same.flip(0)) == pytest.approx(0, abs=1e-9)
    assert energy_distance(same, same.flip(0)) == pytest.approx(0, abs=1e-12)


def test_fewer_rows_than_features_are_no_obstacle():
    assert frechet_distance(rows(4, 9), rows(5, 9, 1)) > 0
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(rows(1, 3), rows(5, 3))


def test_energy_distance_of_points_is_computed_by_hand():
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0]])
    # Pairs across: 3 and 1, mean 2. Within the first: 0, 2, 2, 0, mean 1. Within the second: 0.
    assert energy_distance(first, second) == pytest.approx(2 * 2 - 1 - 0)


def test_energy_distance_grows_with_the_shift():
    near, far = (energy_distance(rows(200, 2), rows(200, 2, 1) + shift) for shift in (0.5, 2.0))
    assert 0 < near < far


def test_coverage_counts_the_classes_that_are_common_enough():
    reference = torch.tensor([0, 1, 2, 3] * 10)
    assert class_coverage(reference, reference, 4) == 1.0
    assert class_coverage(torch.zeros(40).long(), reference, 4) == 0.25
    mostly = torch.tensor([0] * 30 + [1] * 9 + [2] * 1)  # class 2 has 2.5 % where a quarter of 25 % is asked for
    assert class_coverage(mostly, reference, 4) == 0.5
    assert class_coverage(torch.tensor([0, 1]), torch.tensor([0, 1]), 4) == 1.0, "classes that no real image has"


def test_precision_sees_foreign_images_and_recall_missing_ones():
    real, other = rows(100, 2), rows(100, 2, 1) + 100
    assert precision_recall(real, real) == (1.0, 1.0)
    precision, recall = precision_recall(real, torch.cat([real[:20], other[:20]]))
    assert precision == 0.5 and recall < 1
    assert precision_recall(real, other) == (0.0, 0.0)
    with pytest.raises(UserError, match="at least 4 images"):
        precision_recall(real[:3], other)


def pictures(count: int = 60) -> Samples:
    """Class 0 is dark, class 1 bright."""
    label = torch.arange(count) % 2
    noise = torch.randint(0, 60, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return Samples({"image": (noise + 190 * label.view(-1, 1, 1, 1)).to(torch.uint8), "label": label})


class Painter(Sampler):
    """Makes the class that is asked for, or always the same."""

    def __init__(self, always: int | None = None) -> None:
        super().__init__(EDMDenoiser(DenoisingMlp(num_classes=2, width=8, depth=2)))
        self.always = always

    def solve(self, noise_BCHW: Tensor, label_B: Tensor | None, generator: torch.Generator | None) -> Tensor:
        assert label_B is not None
        label_B = label_B if self.always is None else torch.full_like(label_B, self.always)
        return -0.8 + 1.5 * label_B.view(-1, 1, 1, 1) + 0.05 * noise_BCHW


@pytest.fixture(scope="module")
def features() -> FeatureNet:
    return train_feature_net(pictures(), steps=30)


def test_a_feature_network_is_the_same_each_time_and_leaves_the_random_state_alone(features):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = train_feature_net(pictures(), steps=30)
    assert torch.equal(torch.rand(3), expected)
    images = real_images(pictures())
    assert torch.equal(again(images).embedding, features(images).embedding)
    assert (features(images).logits.argmax(-1) == pictures().labels).all()


def test_feature_networks_do_not_change_the_classifier_they_are_made_of():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2))
    found, images = FeatureNet.of(net), torch.rand(3, 1, 8, 8)
    assert torch.equal(found(images).logits, net.eval()(images)) and found(images).embedding.shape == (3, 5)
    assert all(weight.requires_grad for weight in net.parameters())


def test_a_generator_of_all_classes_is_better_than_one_of_a_single_class(features):
    evaluator = GenerationEvaluator(features, count=100)
    good, poor = evaluator(Painter(), pictures()), evaluator(Painter(always=0), pictures())
    assert good["agreement"] == 1.0 and good["coverage"] == 1.0
    assert poor["agreement"] == pytest.approx(0.5, abs=0.05) and poor["coverage"] == 0.5
    assert good["frechet"] < poor["frechet"] and good["energy"] < poor["energy"]
    assert evaluator(Painter(), pictures()) == good, "the same noise each time"


def test_without_a_feature_network_pixels_are_compared():
    assert GenerationEvaluator(count=20)(Painter(), pictures()).keys() == {"energy"}


def test_evaluation_keeps_mode_and_random_state(features):
    model = FewStepSampler(EDMDenoiser(DenoisingMlp(num_classes=2, width=8, depth=2))).train()
    state = torch.get_rng_state()
    GenerationEvaluator(features, count=10)(model, pictures())
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_images_of_another_size_are_refused(features):
    model = EDMDenoiser(DenoisingMlp(image_size=4, num_classes=2, width=8, depth=2))
    with pytest.raises(UserError, match=r"makes images of \[1, 4, 4\]"):
        GenerationEvaluator(features, count=10)(model, pictures())
