"""Facts about which pseudo-labels are kept."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from limbeck.labels import (
    ClassAdaptive,
    RunningQuantile,
    SelfAdaptive,
    class_thresholds,
    fixed,
    percentile,
    quantile,
)

several = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)


def probabilities(seed: int, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)


def test_fixed_keeps_equality_unless_strict() -> None:
    p = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9]])
    assert fixed(p, 0.75, strict=False).tolist() == [True, False, True]
    assert fixed(p, 0.75, strict=True).tolist() == [False, False, True]


def test_fixed_takes_a_threshold_per_item_and_dense_outputs() -> None:
    p = probabilities(0, 2, 4, 3)
    assert torch.equal(fixed(p, p.amax(-1), strict=False), torch.ones(2, 4, dtype=torch.bool))
    assert not fixed(p, p.amax(-1), strict=True).any()


@several
@given(seed=seeds, count=st.integers(1, 40), share=st.floats(0, 1))
def test_quantile_equals_numpy_over_what_is_kept(seed: int, count: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, mask = torch.rand(count, generator=generator), torch.rand(count, generator=generator) > 0.3
    assert quantile(scores, share).item() == pytest.approx(np.quantile(scores.numpy(), share), abs=1e-5)
    if mask.any():
        expected = np.quantile(scores[mask].numpy(), share)
        assert quantile(scores, share, mask=mask).item() == pytest.approx(expected, abs=1e-5)


@several
@given(seed=seeds, share=st.floats(0.05, 0.95))
def test_percentile_keeps_the_share_of_valid_items_that_it_names(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(10, 40, generator=generator)
    mask = torch.rand(10, 40, generator=generator) > 0.3
    low = percentile(scores, share, keep="low", strict=True, mask=mask)
    high = percentile(scores, share, keep="high", strict=False, mask=mask)
    assert abs(low.sum() - share * mask.sum()) <= 1
    assert torch.equal(low | high, mask) and not (low & high).any()


@pytest.mark.parametrize("keep", ["low", "high"])
def test_percentile_of_nothing_keeps_nothing(keep: str) -> None:
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert not percentile(torch.rand(3, 4), 0.8, keep=keep, strict=False, mask=nothing).any()


def test_percentile_refuses_another_side_and_a_share_outside_zero_one() -> None:
    with pytest.raises(ValueError, match="'lowest'"):
        percentile(torch.rand(3), 0.5, keep="lowest", strict=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share is 80"):
        percentile(torch.rand(3), 80, keep="low", strict=True)


def test_class_thresholds_follow_the_map_x_over_two_minus_x() -> None:
    got = class_thresholds(torch.tensor([10, 5, 0]), 0.95)
    assert torch.allclose(got, torch.tensor([0.95, 0.95 * 0.5 / 1.5, 0.0]))


@several
@given(counts=st.lists(st.integers(0, 100), min_size=2, max_size=8), unassigned=st.integers(0, 200))
def test_class_thresholds_rise_with_the_count_and_never_exceed_the_fixed_one(
    counts: list[int], unassigned: int
) -> None:
    got = class_thresholds(torch.tensor(counts), 0.9, unassigned=float(unassigned))
    assert (got >= 0).all() and (got <= 0.9 + 1e-6).all() and got.isfinite().all()
    order = torch.tensor(counts).argsort()
    assert (got[order].diff() >= -1e-6).all()


def test_class_thresholds_of_equal_or_no_counts_are_the_fixed_threshold() -> None:
    for counts in (torch.full((4,), 7), torch.zeros(4), torch.full((4,), 0.25)):
        assert torch.allclose(class_thresholds(counts, 0.95), torch.full((4,), 0.95))


def looped_flexmatch(
    batches: list[tuple[Tensor, Tensor]], samples: int, classes: int, warm_up: bool
) -> list[list[bool]]:
    assigned, masks = [-1] * samples, []
    for p, index in batches:
        counts = [assigned.count(c) for c in range(classes)]
        most = max([*counts, assigned.count(-1)] if warm_up else counts)
        status = [n / most if most else 1.0 for n in counts]
        masks.append([row.max().item() >= 0.8 * status[row.argmax()] / (2 - status[row.argmax()]) for row in p])
        for row, i in zip(p, index.tolist(), strict=True):
            if row.max() >= 0.8:
                assigned[i] = int(row.argmax())
    return masks


@pytest.mark.parametrize("warm_up", [True, False])
def test_class_adaptive_equals_the_loop_of_flexmatch(warm_up: bool) -> None:
    order = [torch.randperm(24, generator=torch.Generator().manual_seed(e)).split(8) for e in range(3)]
    batches = [(probabilities(i, 8, 3), index) for i, index in enumerate(sum(order, ()))]
    threshold = ClassAdaptive(24, 3, threshold=0.8, warm_up=warm_up)
    masks = [threshold(p, index).tolist() for p, index in batches]
    assert masks == looped_flexmatch(batches, 24, 3, warm_up)
    assert any(not all(mask) for mask in masks) and any(any(mask) for mask in masks)


def test_class_adaptive_keeps_everything_before_the_first_sure_sample_when_warming_up() -> None:
    p = torch.full((4, 3), 1 / 3)
    assert ClassAdaptive(10, 3, warm_up=True)(p, torch.arange(4)).all()
    assert not ClassAdaptive(10, 3, warm_up=False)(p, torch.arange(4)).any()


def test_self_adaptive_equals_the_equations_of_freematch() -> None:
    threshold = SelfAdaptive(3, decay=0.9)
    overall, per_class = 1 / 3, torch.full((3,), 1 / 3)
    for seed in range(4):
        p = probabilities(seed, 8, 3)
        overall = 0.9 * overall + 0.1 * p.max(1).values.mean()
        per_class = 0.9 * per_class + 0.1 * p.mean(0)
        expected = p.max(1).values >= (overall * per_class / per_class.max())[p.argmax(1)]
        assert torch.equal(threshold(p), expected)
    assert torch.allclose(threshold.thresholds(), overall * per_class / per_class.max())


def looped_hiast(theta: Tensor, p: Tensor, share: float, decay: float, gamma: float) -> Tensor:
    confidence, classes = p.max(-1)
    result = theta.clone()
    for c in range(len(theta)):
        values = torch.cat([confidence[classes == c], theta[c : c + 1]])
        psi = torch.quantile(values, float(1 - share * theta[c] ** gamma))
        result[c] = decay * theta[c] + (1 - decay) * psi
    return torch.where(result >= 1, torch.tensor(0.999), result)


@several
@given(seed=seeds, share=st.floats(0.1, 1), gamma=st.floats(0, 8))
def test_running_quantile_equals_a_loop_over_classes(seed: int, share: float, gamma: float) -> None:
    threshold = RunningQuantile(5, share=share, decay=0.6, gamma=gamma)
    for step in range(3):
        p = probabilities(seed + step, 2, 9, 5)
        expected = looped_hiast(threshold.theta.clone(), p.flatten(0, 1), share, 0.6, gamma)
        mask = threshold(p)
        assert torch.allclose(threshold.theta, expected, atol=1e-5)
        confidence, classes = p.max(-1)
        assert torch.equal(mask, confidence >= threshold.theta[classes])


def test_running_quantile_leaves_an_absent_class_and_with_decay_one_is_a_fixed_threshold() -> None:
    p = torch.tensor([[0.98, 0.01, 0.01], [0.5, 0.3, 0.2]])
    threshold = RunningQuantile(3)
    threshold(p)
    assert torch.equal(threshold.theta[1:], torch.full((2,), 0.9)) and threshold.theta[0] != 0.9
    assert RunningQuantile(3, decay=1.0)(p).tolist() == fixed(p, 0.9, strict=False).tolist()


def test_running_quantile_with_share_one_and_gamma_zero_keeps_everything_in_the_limit() -> None:
    p = probabilities(0, 50, 3)
    assert RunningQuantile(3, share=1.0, gamma=0.0, decay=0.0)(p).all()


def test_a_larger_gamma_keeps_less_of_a_class_whose_threshold_is_low() -> None:
    p = probabilities(0, 200, 3)
    kept = [int(RunningQuantile(3, gamma=gamma, decay=0.0, initial=0.5)(p).sum()) for gamma in (0.0, 2.0, 8.0)]
    assert kept[0] > kept[1] > kept[2]


def test_running_quantile_stays_below_one() -> None:
    threshold = RunningQuantile(2, decay=0.0, share=0.0)
    threshold(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert threshold.theta[0].item() == pytest.approx(0.999)


WITH_MEMORY = {
    "class_adaptive": lambda: partial_forward(ClassAdaptive(8, 3, threshold=0.5)),
    "self_adaptive": lambda: partial_forward(SelfAdaptive(3, decay=0.5)),
    "running_quantile": lambda: partial_forward(RunningQuantile(3)),
}


def partial_forward(module: torch.nn.Module) -> tuple[torch.nn.Module, partial]:
    takes_index = isinstance(module, ClassAdaptive)
    return module, partial(lambda p: module(p, torch.arange(len(p))) if takes_index else module(p))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_moves_in_train_mode_only_and_comes_back_from_a_checkpoint(name: str) -> None:
    module, call = WITH_MEMORY[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.eval()
    call(probabilities(0, 8, 3))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module.train()
    call(probabilities(0, 8, 3))
    assert any(not torch.equal(value, before[key]) for key, value in module.state_dict().items())
    other, call_other = WITH_MEMORY[name]()
    other.load_state_dict(module.state_dict())
    assert torch.equal(call(probabilities(1, 8, 3)), call_other(probabilities(1, 8, 3)))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_nothing_that_passes_leaves_finite_state_and_half_precision_works(name: str) -> None:
    module, call = WITH_MEMORY[name]()
    for _ in range(3):
        mask = call(torch.full((8, 3), 1 / 3).half().requires_grad_())
        assert mask.dtype == torch.bool and mask.shape == (8,)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert not any(value.requires_grad for value in module.state_dict().values())
