"""ShrinkMatch: the batched search against the paper's double loop, and every place that must get no gradient.

Letters: U unlabelled samples, C classes, D width of the features. A student that is one linear layer has the identity
as its backbone: on the rows of an identity matrix the main head's logits are its weights, and a weak view's logits can
be chosen freely.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.methods.few_labels.fixmatch import FixMatch
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch, auxiliary_head, shrink
from limbeck.train import Batch

B, U = 3, 6
D = B + 2 * U


def looped_shrink(aux_UC: Tensor, p_UC: Tensor, threshold: float) -> Tensor:
    """The paper's algorithm: sum over uncertain samples of q_0 CE in the shrunk space, classes removed one by one."""
    total = torch.zeros((), dtype=aux_UC.dtype)
    for p_C, aux_C in zip(p_UC.tolist(), aux_UC, strict=True):
        if max(p_C) >= threshold:
            continue
        order = sorted(range(len(p_C)), key=lambda c: -p_C[c])
        for first_kept in range(2, len(p_C)):
            kept = [order[0], *order[first_kept:]]
            confidence = p_C[order[0]] / sum(p_C[c] for c in kept)
            if confidence >= threshold:
                total = total - p_C[order[0]] * aux_C[kept].log_softmax(-1)[0]
                break
    return total


def near_the_threshold(p_UC: Tensor, threshold: float) -> bool:
    """Whether a confidence lies so close to the threshold that rounding decides."""
    q_UC = p_UC.double().sort(-1, descending=True).values
    tails_UC = q_UC.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    return bool(((q_UC[:, :1] / (q_UC[:, :1] + tails_UC) - threshold).abs() < 1e-4).any())


def probabilities(seed: int, size: int, classes: int) -> Tensor:
    """Rows from flat to sharp."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.2, 6, size)[:, None]
    return (torch.randn(size, classes, generator=generator) * sharpness).softmax(-1)


def shrunk_sum(aux_UC: Tensor, p_UC: Tensor, threshold: float) -> Tensor:
    shrunk = shrink(aux_UC, p_UC, threshold)
    uncertain = p_UC.amax(-1) < threshold
    return (uncertain * shrunk.passed_B * shrunk.confidence_B * shrunk.loss_B).sum()


@pytest.mark.parametrize("classes", range(3, 21))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.5, 0.99))
def test_all_steps_at_once_equal_the_double_loop_in_value_and_gradient(classes, seed, threshold):
    p_UC = probabilities(seed, 24, classes)
    assume(not near_the_threshold(p_UC, threshold))
    torch.manual_seed(seed)
    aux_UC = torch.randn(24, classes).mul(3).requires_grad_()
    ours, looped = shrunk_sum(aux_UC, p_UC, threshold), looped_shrink(aux_UC, p_UC, threshold)
    torch.testing.assert_close(ours, looped, rtol=1e-4, atol=1e-5)
    if looped.requires_grad:
        (ours_UC,) = torch.autograd.grad(ours, aux_UC)
        (looped_UC,) = torch.autograd.grad(looped, aux_UC)
        torch.testing.assert_close(ours_UC, looped_UC, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(3, 20))
def test_permuting_the_classes_changes_nothing(seed, classes):
    p_UC = probabilities(seed, 12, classes)
    assume(not near_the_threshold(p_UC, 0.9))
    torch.manual_seed(seed)
    aux_UC, permutation = torch.randn(12, classes), torch.randperm(classes)
    first, second = shrink(aux_UC, p_UC, 0.9), shrink(aux_UC[:, permutation], p_UC[:, permutation], 0.9)
    assert torch.equal(first.passed_B, second.passed_B)
    torch.testing.assert_close(first.loss_B, second.loss_B)
    torch.testing.assert_close(first.confidence_B, second.confidence_B)


@settings(max_examples=25, deadline=None)
@given(permutation=st.permutations(range(5)), seed=st.integers(0, 1000))
def test_five_classes_of_which_three_must_go(permutation, seed):
    """.5/.6 = .833 and .5/.54 = .926 fail, .5/.51 = .980 passes: the first and the last class stay, with weight .5."""
    order = torch.tensor(permutation)
    p_BC = torch.zeros(1, 5)
    p_BC[0, order] = torch.tensor([0.5, 0.4, 0.06, 0.03, 0.01])
    torch.manual_seed(seed)
    aux_BC = torch.randn(1, 5, requires_grad=True)
    loss_B, passed_B, confidence_B = shrink(aux_BC, p_BC, 0.95)
    assert passed_B.item() and confidence_B.item() == pytest.approx(0.5)
    torch.testing.assert_close(loss_B, -aux_BC[:, order[[0, 4]]].log_softmax(-1)[:, 0])
    loss_B.sum().backward()
    assert not aux_BC.grad[0, order[1:4]].any()
    assert aux_BC.grad[0, order[[0, 4]]].all()


def test_the_search_stops_at_the_first_space_that_passes():
    p_BC, aux_BC = torch.tensor([[0.5, 0.4, 0.06, 0.03, 0.01]]), torch.randn(1, 5)
    for threshold, kept in ((0.83, [0, 2, 3, 4]), (0.92, [0, 3, 4]), (0.95, [0, 4])):
        shrunk = shrink(aux_BC, p_BC, threshold)
        assert shrunk.passed_B.item()
        torch.testing.assert_close(shrunk.loss_B, -aux_BC[:, kept].log_softmax(-1)[:, 0])


def test_the_runner_up_is_always_removed():
    shrunk = shrink(torch.zeros(1, 4), torch.tensor([[0.94, 0.03, 0.02, 0.01]]), 0.95)
    torch.testing.assert_close(shrunk.loss_B.exp(), torch.tensor([3.0]))  # three classes are left


@pytest.mark.parametrize("row", [[0.3, 0.25, 0.23, 0.22], [0.9, 0.1], [0.4, 0.3, 0.3]])
def test_where_no_space_passes_the_loss_is_exactly_zero(row):
    aux_BC = torch.randn(1, len(row), requires_grad=True)
    shrunk = shrink(aux_BC, torch.tensor([row]), 0.95)
    shrunk.loss_B.sum().backward()
    assert not shrunk.passed_B.item()
    assert shrunk.loss_B.item() == 0 and not aux_BC.grad.any()


# -- the method -----------------------------------------------------------------------------------------------------


def method_of(weak_UC: Tensor, *, seed: int = 0, **settings) -> tuple[ShrinkMatch, Batch]:
    """A method whose logits of the weak views are `weak_UC`, and its batch."""
    torch.manual_seed(seed)
    classes = weak_UC.shape[-1]
    student = nn.Linear(D, classes, bias=False)
    student.weight.data = torch.randn(classes, D) * 2
    student.weight.data[:, B : B + U] = weak_UC.T
    labelled, weak, strong = torch.eye(D).split([B, U, U])
    label = torch.arange(B) % classes
    batch = {"labelled": {"weak": labelled, "label": label}, "unlabelled": {"weak": weak, "strong": strong}}
    return ShrinkMatch(student, **settings), batch


def mixed_logits(seed: int = 0, classes: int = 5) -> Tensor:
    """Logits of certain samples, of samples that pass in a smaller space, and of one that never passes."""
    rows = [[0.97, 0.01], [0.5, 0.4, 0.06, 0.03, 0.01], [0.3, 0.29, 0.28], [0.7, 0.28, 0.01], [0.6, 0.38], [0.99]]
    p_UC = torch.zeros(U, classes)
    for row, given_row in zip(p_UC, rows, strict=True):
        values = given_row[:classes]
        row[: len(values)] = torch.tensor(values)
        row[len(values) :] = (1 - sum(values)) / max(1, classes - len(values))
    p_UC = p_UC / p_UC.sum(-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(classes, generator=generator)] for row in p_UC]).log()


def auxiliary_logits(method: ShrinkMatch, batch: Batch) -> Tensor:
    backbone, _ = method.student
    return method.aux(backbone(batch["unlabelled"]["strong"]))


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("target", ["soft", "hard"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_step_is_the_papers_algorithm(target, align, seed):
    weak_UC, threshold = mixed_logits(seed), 0.95
    p_UC = weak_UC.softmax(-1)
    if align:
        p_UC = p_UC / p_UC.mean(0)
        p_UC = p_UC / p_UC.sum(-1, keepdim=True)
    assume(not near_the_threshold(p_UC, threshold))
    method, batch = method_of(weak_UC, seed=seed, threshold=threshold, target=target, align=align)
    losses = method.training_step(batch)

    logits_BC, _, strong_UC = method.student.head.weight.T.split([B, U, U])
    certain_U = (p_UC.amax(-1) >= threshold).float()
    goal_UC = F.one_hot(p_UC.argmax(-1), 5) if target == "hard" else p_UC
    certain = (certain_U * -(goal_UC * strong_UC.log_softmax(-1)).sum(-1)).sum() / U
    shrunk = certain_U.mean() * looped_shrink(auxiliary_logits(method, batch), p_UC, threshold) / U
    torch.testing.assert_close(losses["ce"], F.cross_entropy(logits_BC, batch["labelled"]["label"]))
    torch.testing.assert_close(losses["certain"], certain)
    torch.testing.assert_close(losses["shrunk"], shrunk, rtol=1e-4, atol=1e-6)
    assert align or losses["shrunk"] > 0
    assert method.weights == {}


def test_a_sample_that_no_shrunk_space_makes_certain_contributes_exactly_nothing():
    """.3 / .52 = .577 is all that four classes of [.3, .25, .23, .22] allow."""
    weak_UC = torch.tensor([[0.3, 0.25, 0.23, 0.22]]).log().repeat(U, 1)
    weak_UC[0] = torch.tensor([50.0, 0, 0, 0])  # one certain sample, so that the weight r is not what makes it 0
    method, batch = method_of(weak_UC)
    shrunk = method.training_step(batch)["shrunk"]
    shrunk.backward()
    assert method.certain_ratio > 0
    assert shrunk == 0
    assert not any(p.grad.any() for p in method.aux.parameters())


def test_with_two_classes_there_is_no_shrunk_loss():
    weak_UC = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.99, 0.01]]).log().repeat(2, 1)
    method, batch = method_of(weak_UC)
    losses = method.training_step(batch)
    (losses["ce"] + losses["certain"] + losses["shrunk"]).backward()
    assert method.certain_ratio > 0
    assert losses["shrunk"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("target", ["soft", "hard"])
def test_where_all_samples_are_certain_it_is_exactly_fixmatch(target):
    weak_UC = torch.eye(5)[torch.arange(U) % 5] * 10
    ours, batch = method_of(weak_UC, target=target)
    theirs = FixMatch(copy.deepcopy(ours.student), target=target)
    mine, reference = ours.training_step(batch), theirs.training_step(batch)
    assert mine["shrunk"] == 0
    assert torch.equal(mine["ce"] + mine["certain"] + mine["shrunk"], reference["ce"] + reference["unlabelled"])
    sum(mine.values()).backward()
    sum(reference.values()).backward()
    assert torch.equal(ours.student.head.weight.grad, theirs.student.head.weight.grad)
    assert not any(p.grad.any() for p in ours.aux.parameters())


def test_the_shrunk_loss_reaches_the_auxiliary_head_and_the_backbone_but_not_the_main_head():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 5))
    _, batch = method_of(mixed_logits())
    method = ShrinkMatch(student, threshold=0.5)
    method.certain_ratio.fill_(0.5)
    shrunk = method.training_step(batch)["shrunk"]
    shrunk.backward()
    backbone, head = method.student
    assert shrunk > 0
    assert head.weight.grad is None and head.bias.grad is None
    assert all(p.grad.any() for p in backbone.parameters())
    assert method.aux[-1].weight.grad.any()


def test_no_loss_of_unlabelled_samples_sends_a_gradient_through_weak_views():
    method, batch = method_of(mixed_logits())
    batch["unlabelled"]["weak"] = batch["unlabelled"]["weak"].clone().requires_grad_()
    batch["unlabelled"]["strong"] = batch["unlabelled"]["strong"].clone().requires_grad_()
    losses = method.training_step(batch)
    assert losses["certain"] > 0 and losses["shrunk"] > 0
    (losses["certain"] + losses["shrunk"]).backward()
    assert not batch["unlabelled"]["weak"].grad.any()
    assert batch["unlabelled"]["strong"].grad.any(-1).any()
    assert not method.student.head.weight.grad[:, B : B + U].any()


def test_the_auxiliary_head_is_trained_by_strong_views_alone():
    method, batch = method_of(mixed_logits())
    method.training_step(batch)
    norm = method.aux[1]
    assert norm.num_batches_tracked == 1
    hidden = method.aux[0](batch["unlabelled"]["strong"])
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean(0))


def test_the_running_share_starts_at_the_first_batch_and_then_moves_slowly():
    method, batch = method_of(mixed_logits(), ratio_decay=0.9)
    first = method.training_step(batch)["shrunk"]
    share = method.logged["certain_share"]
    assert share == pytest.approx(2 / 6)
    assert method.certain_ratio == share
    method.threshold = 1.0  # nothing is certain any more
    method.training_step(batch)
    assert method.certain_ratio == pytest.approx(0.9 * share)
    method.threshold = 0.95
    again = method.training_step(batch)["shrunk"]
    torch.testing.assert_close(again, first * (0.9 * 0.9 + 0.1))


def test_the_running_share_is_in_the_checkpoint_and_goes_on_over_epochs():
    method, batch = method_of(mixed_logits())
    method.training_step(batch)
    share = method.certain_ratio.clone()
    method.after_epoch()
    resumed, _ = method_of(mixed_logits(), seed=1)
    resumed.load_state_dict(method.state_dict())
    assert resumed.certain_ratio == method.certain_ratio == share


def test_utilisation_counts_certain_and_shrunk_samples_and_is_above_that_of_fixmatch():
    method, batch = method_of(mixed_logits())
    method.training_step(batch)
    # rows 0 and 5 are certain; 1, 3 and 4 pass in a smaller space; 2 passes in none
    assert method.logged["certain_share"] == pytest.approx(2 / 6)
    assert method.logged["utilisation"] == pytest.approx(5 / 6)
    reference = FixMatch(copy.deepcopy(method.student))
    reference.training_step(batch)
    assert method.logged["utilisation"] > reference.logged["utilisation"]


def test_hidden_labels_are_measured_and_never_learnt_from():
    weak_UC = mixed_logits()
    blind, batch = method_of(weak_UC)
    without = blind.training_step(batch)
    truth = weak_UC.argmax(-1)
    truth[1] = (truth[1] + 1) % 5  # row 1 is shrunk and wrong
    for labels, right in ((truth, 2 / 6), (torch.full((U,), 99), 0.0)):
        method, batch = method_of(weak_UC)
        batch["unlabelled"] = {**batch["unlabelled"], "hidden_label": labels, "label": labels}
        losses = method.training_step(batch)
        assert all(torch.equal(losses[name], without[name]) for name in without)
        assert method.logged["shrunk_right"] == pytest.approx(right)
    assert "shrunk_right" not in blind.logged


def test_what_ships_is_the_moving_average_without_the_auxiliary_head():
    method, batch = method_of(mixed_logits(), ema_decay=0.9)
    start = method.student.head.weight.detach().clone()
    method.student.head.weight.data += 1
    method.after_step()
    shipped = method.shipped()
    torch.testing.assert_close(shipped.head.weight, start + 0.1)
    assert list(shipped.state_dict()) == ["head.weight"]
    assert shipped(batch["labelled"]["weak"]).shape == (B, 5)


def test_the_auxiliary_head_is_as_in_the_paper():
    head = auxiliary_head(64, 10)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU] * 2 + [nn.Linear]
    assert [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)] == [
        (16, 64),
        (16, 16),
        (10, 16),
    ]
    assert all(layer.negative_slope == 0.1 for layer in head if isinstance(layer, nn.LeakyReLU))


@pytest.mark.parametrize("setting", [{"threshold": 95.0}, {"threshold": -0.1}, {"ratio_decay": 1.1}])
def test_settings_out_of_range_are_refused_at_the_door(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        method_of(mixed_logits(), **setting)
