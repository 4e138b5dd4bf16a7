"""The identities of LPLD's card. Shapes: B images, R regions, K classes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.methods.detection.lpld import (
    BACKGROUND_MASS,
    LPLD,
    distillation_loss,
    low_confidence,
    refined_boxes,
    without_background,
)
from limbeck.models.detection import (
    DELTA_WEIGHTS,
    Proposals,
    Scored,
    Targets,
    TwoStageDetector,
    decode_boxes,
    load_detector,
    pairwise_iou,
)
from limbeck.train import Batch

K, R, B = 3, 12, 2
SMALL = {"channels": [8, 8, 8], "width": 8, "hidden": 16, "bins": 4, "rpn_after": [20, 15], "samples": 16}


def scored(seed: int = 0, scale: float = 3.0) -> Scored:
    generator = torch.Generator().manual_seed(seed)
    return Scored(
        torch.randn(B, R, K + 1, generator=generator) * scale,
        torch.randn(B, R, K, 4, generator=generator),
        torch.randn(B, R, 8, generator=generator).relu(),
    )


def proposals(seed: int = 0) -> Proposals:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(B, R, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(B, R, 2, generator=generator) * 15], -1)
    return Proposals(boxes, torch.zeros(B, R), torch.ones(B, R, dtype=torch.bool))


def confident(boxes: Tensor) -> Targets:
    return Targets(boxes, torch.zeros(boxes.shape[:2], dtype=torch.long))


LIMITS = {"iou": 0.4, "certainty": 0.5, "background": 0.99}
FAR = confident(torch.tensor([[[500.0, 500, 510, 510]]] * B))


# -- the labels -------------------------------------------------------------------------------------------------------


def test_boxes_are_refined_by_the_deltas_of_their_best_class_and_background_keeps_the_proposal():
    given_proposals, answer = proposals(), scored()
    refined = refined_boxes(given_proposals.boxes, answer)
    kinds = set()
    for b in range(B):
        for r in range(R):
            best = int(answer.logits[b, r].argmax())
            kinds.add(best == K)
            box = given_proposals.boxes[b, r]
            if best < K:
                dx, dy, dw, dh = (answer.deltas[b, r, best] / torch.tensor(DELTA_WEIGHTS)).tolist()
                width, height = float(box[2] - box[0]), float(box[3] - box[1])
                x, y = float(box[0]) + width / 2 + dx * width, float(box[1]) + height / 2 + dy * height
                cap = math.log(1000 / 16)
                half_w, half_h = math.exp(min(dw, cap)) * width / 2, math.exp(min(dh, cap)) * height / 2
                box = torch.tensor([x - half_w, y - half_h, x + half_w, y + half_h])
            torch.testing.assert_close(refined[b, r], box, rtol=1e-4, atol=1e-3)
    assert kinds == {True, False}


def test_the_covered_test_reads_the_refined_boxes_and_not_the_proposals():
    given_proposals, answer = proposals(), scored()
    answer.logits[..., 0] = 10.0  # all are class 0
    answer.deltas[..., 0, :2] = 80.0  # which moves them by eight of their sizes
    on_the_proposals = confident(given_proposals.boxes)
    on_the_refined = confident(refined_boxes(given_proposals.boxes, answer))
    assert low_confidence(given_proposals, answer, on_the_proposals, **LIMITS).any()
    assert not low_confidence(given_proposals, answer, on_the_refined, **LIMITS).any()


def test_labels_are_uncovered_certain_among_classes_and_not_surely_background():
    given_proposals, answer = proposals(1), scored(1)
    covering = confident(given_proposals.boxes[:, :4])
    kept = low_confidence(given_proposals, answer, covering, iou=0.4, certainty=0.8, background=0.6)
    iou = pairwise_iou(refined_boxes(given_proposals.boxes, answer), covering.boxes)
    whole, alone = answer.logits.softmax(-1), answer.logits[..., :K].softmax(-1)
    for b in range(B):
        for r in range(R):
            expected = iou[b, r].max() <= 0.4 and alone[b, r].max() >= 0.8 and whole[b, r, K] <= 0.6
            assert kept[b, r].item() == bool(expected)
    assert kept.any() and not kept.all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_looser_limits_never_lose_a_label(seed):
    given_proposals, answer = proposals(seed), scored(seed)
    covering = confident(given_proposals.boxes[:, ::2])
    tight = low_confidence(given_proposals, answer, covering, iou=0.3, certainty=0.9, background=0.9)
    for looser in ({"iou": 0.5}, {"certainty": 0.7}, {"background": 0.99}):
        limits = {"iou": 0.3, "certainty": 0.9, "background": 0.9, **looser}
        assert (low_confidence(given_proposals, answer, covering, **limits) >= tight).all()


def test_without_confident_boxes_or_with_all_covered_nothing_is_kept_and_empty_slots_never_are():
    given_proposals, answer = proposals(), scored(scale=8.0)
    nothing = Targets(torch.zeros(B, 2, 4), torch.full((B, 2), -1))
    assert low_confidence(given_proposals, answer, FAR, **LIMITS).any()
    assert not low_confidence(given_proposals, answer, nothing, **LIMITS).any()
    everything = confident(refined_boxes(given_proposals.boxes, answer))
    assert not low_confidence(given_proposals, answer, everything, **LIMITS).any()
    slots = given_proposals._replace(valid=torch.zeros(B, R, dtype=torch.bool))
    assert not low_confidence(slots, answer, FAR, **LIMITS).any()


def test_one_picture_without_confident_boxes_is_skipped_alone():
    labels = torch.tensor([[0], [-1]])
    kept = low_confidence(proposals(), scored(scale=8.0), Targets(FAR.boxes, labels), **LIMITS)
    assert kept[0].any() and not kept[1].any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-5, 5))
def test_a_constant_on_all_foreground_logits_changes_the_background_but_not_the_classes(seed, shift):
    logits = scored(seed).logits
    moved = logits + torch.tensor([shift] * K + [0.0])
    before, after = without_background(logits), without_background(moved)
    torch.testing.assert_close(after.classes, before.classes)
    if abs(shift) > 0.01:
        lower = after.background < before.background if shift > 0 else after.background > before.background
        saturated = (before.background > 0.999) | (before.background < 1e-6)
        assert (lower | saturated).all()


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_kl_of_a_loop():
    student, teacher = scored(0), scored(1)
    kept = torch.rand(B, R, generator=torch.Generator().manual_seed(0)) < 0.5
    total = 0.0
    for b in range(B):
        rows = kept[b].nonzero().flatten().tolist()
        for r in rows:
            t = torch.cat([teacher.logits[b, r, :K].softmax(0), torch.tensor([BACKGROUND_MASS])])
            weight = 1 - F.cosine_similarity(student.features[b, r], teacher.features[b, r], dim=0)
            kl = (t * (t.log() - student.logits[b, r].log_softmax(0))).sum()
            total = total + weight * kl / len(rows) / B
    torch.testing.assert_close(distillation_loss(student, teacher, kept), torch.as_tensor(total))


def test_the_target_sums_to_one_and_the_background_mass():
    p = without_background(scored().logits)
    target = F.pad(p.classes.double(), (0, 1), value=BACKGROUND_MASS)
    torch.testing.assert_close(target.sum(-1), torch.full((B, R), 1 + 1e-9, dtype=torch.float64), rtol=0, atol=5e-7)


def test_a_sure_teacher_of_other_features_asks_for_its_class_by_cross_entropy():
    student, teacher = scored(0), scored(1)
    teacher.logits[..., 1] = 200.0  # the gap of 200 makes the other classes' probabilities exactly 0
    student.features[..., 4:], teacher.features[..., :4] = 0.0, 0.0
    student.features[..., :4], teacher.features[..., 4:] = 1.0, 1.0  # orthogonal: weight 1
    loss = distillation_loss(student, teacher, torch.ones(B, R, dtype=torch.bool))
    expected = F.cross_entropy(student.logits.flatten(0, 1), torch.ones(B * R, dtype=torch.long))
    assert loss.isfinite()
    torch.testing.assert_close(loss, expected)


def test_equal_features_cost_nothing_and_have_no_gradient_although_the_target_lacks_background():
    answer = scored()
    student = Scored(*(part.clone().requires_grad_() for part in answer))
    loss = distillation_loss(student, answer, torch.ones(B, R, dtype=torch.bool))
    loss.backward()
    assert loss.abs() < 1e-5 and student.logits.grad.abs().max() < 1e-6
    student.logits.grad = None
    other = Scored(answer.logits, answer.deltas, answer.features.flip(-1))
    distillation_loss(student, other, torch.ones(B, R, dtype=torch.bool)).backward()
    assert student.logits.grad.abs().max() > 1e-4


def test_the_gradient_reaches_the_students_logits_alone():
    student = Scored(*(part.requires_grad_() for part in scored(0)))
    teacher = Scored(*(part.requires_grad_() for part in scored(1)))
    distillation_loss(student, teacher, torch.ones(B, R, dtype=torch.bool)).backward()
    assert student.logits.grad.any()
    assert all(part.grad is None for part in (*teacher, student.features, student.deltas))


def test_nothing_kept_is_zero_with_zero_gradient():
    student = Scored(*(part.requires_grad_() for part in scored(0)))
    loss = distillation_loss(student, scored(1), torch.zeros(B, R, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not student.logits.grad.any()


# -- the method -------------------------------------------------------------------------------------------------------


def source(seed: int = 0) -> TwoStageDetector:
    """A detector that is sure enough of something to have confident and low-confidence labels."""
    torch.manual_seed(seed)
    model = load_detector("compact", num_classes=K, config=SMALL)
    assert isinstance(model, TwoStageDetector)
    nn.init.normal_(model.classifier.weight, std=1.0)
    nn.init.normal_(model.box_regressor.weight, std=0.1)
    return model


def batch(same: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    weak, strong = torch.rand(2, B, 3, 40, 48, generator=generator)
    return {"target": {"weak": weak, "strong": weak if same else strong}}


def step(method: LPLD, fields: Batch, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return method.training_step(fields)  # type: ignore[return-value]


LOOSE = {"score": 0.3, "certainty": 0.3, "iou": 0.9}


def test_a_step_is_the_papers_algorithm():
    method, fields = LPLD(source(), **LOOSE), batch()
    losses = step(method, fields)
    teacher, student = method.teacher.model, method.student
    features = teacher.features(fields["target"]["weak"])
    found_proposals = teacher.propose(teacher.rpn(features), features)
    answer = teacher.score_boxes(features, found_proposals.boxes)
    found = teacher(fields["target"]["weak"])
    sure = found.scores > 0.3
    hpl = Targets(found.boxes * sure[..., None], found.labels.masked_fill(~sure, -1))
    torch.manual_seed(0)
    expected = student.losses(fields["target"]["strong"], hpl)
    kept = low_confidence(found_proposals, answer, hpl, iou=0.9, certainty=0.3, background=0.99)
    own = student.score_boxes(student.features(fields["target"]["strong"]), found_proposals.boxes)
    expected["lpl"] = 0.1 * distillation_loss(own, answer, kept)
    assert losses["lpl"] > 0 and kept.any()
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, expected[name])
    assert method.logged["confident_boxes"] == hpl.valid.sum() / B and method.logged["low_confidence"] == kept.sum() / B


def test_with_scale_zero_it_is_the_mean_teacher_with_the_same_random_numbers():
    plain, whole = LPLD(source(), **LOOSE, scale=0.0), LPLD(source(), **LOOSE)
    without, state = step(plain, batch()), torch.get_rng_state()
    with_lpl = step(whole, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert without["lpl"] == 0 < with_lpl["lpl"]
    assert all(torch.equal(without[name], with_lpl[name]) for name in without if name != "lpl")


def test_student_and_teacher_alike_on_one_view_have_nothing_to_distil():
    method = LPLD(source(), **LOOSE)
    loss = step(method, batch(same=True))["lpl"]
    loss.backward()
    assert method.logged["low_confidence"] > 0 and loss.abs() < 1e-6
    gradients = [p.grad for p in method.student.parameters() if p.grad is not None]
    assert all(g.abs().max() < 1e-5 for g in gradients)


def test_without_confident_boxes_the_loss_is_finite_and_lpld_is_skipped():
    method = LPLD(source(), score=1.0, certainty=0.3)
    losses = step(method, batch())
    assert losses["lpl"] == 0 and losses["rpn_box"] == 0 and losses["region_box"] == 0
    assert losses["rpn_objectness"] > 0 and losses["region_class"] > 0
    assert all(value.isfinite() for value in losses.values())


def test_the_teacher_gets_no_gradient_and_stays_in_eval_mode():
    method = LPLD(source(), **LOOSE).train()
    sum(step(method, batch()).values()).backward()
    assert not method.teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert {id(p) for p in method.parts()["student"]} == {id(p) for p in method.student.parameters()}


def test_the_teacher_stands_still_within_an_epoch_and_then_takes_a_quarter_of_the_student():
    model = source()
    model.register_buffer("statistic", torch.tensor(1.0))
    method = LPLD(model)
    before = copy.deepcopy(method.teacher.model.state_dict())
    for value in method.student.state_dict().values():
        value.add_(1.0)
    method.after_step()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.model.state_dict().items())
    method.after_epoch()
    for name, value in method.teacher.model.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.25)


def test_the_teacher_may_move_after_every_step_instead():
    method = LPLD(source(), ema_every="step", ema_decay=0.9)
    start = method.teacher.model.classifier.weight.clone()
    method.student.classifier.weight.data.add_(1.0)
    method.after_epoch()
    assert torch.equal(method.teacher.model.classifier.weight, start)
    method.after_step()
    torch.testing.assert_close(method.teacher.model.classifier.weight, start + 0.1)


def test_the_teacher_ships_unless_the_student_is_asked_for():
    assert (teacher := LPLD(source())).shipped() is teacher.teacher.model
    assert (student := LPLD(source(), ship="student")).shipped() is student.student


def test_a_picture_at_a_time_averages_to_the_batch():
    """LPLD's own term is local to a picture: processes with other pictures average to one process with all."""
    method, fields = LPLD(source(), **LOOSE), batch()
    whole = step(method, fields)["lpl"]
    parts = [{"target": {name: view[b : b + 1] for name, view in fields["target"].items()}} for b in range(B)]
    torch.testing.assert_close(whole, sum(step(method, part)["lpl"] for part in parts) / B)


def test_hidden_boxes_are_measured_and_never_learnt_from():
    method, fields = LPLD(source(), **LOOSE), batch()
    blind = step(method, fields)
    assert "low_confidence_right" not in method.logged
    found_proposals, answer, hpl = method.watch(fields["target"]["weak"])
    kept = low_confidence(found_proposals, answer, hpl, iou=0.9, certainty=0.3, background=0.99)
    b, r = kept.nonzero()[0].tolist()
    boxes, labels = torch.zeros(B, 1, 4), torch.full((B, 1), -1)
    boxes[b, 0] = refined_boxes(found_proposals.boxes, answer)[b, r]
    labels[b, 0] = answer.logits[b, r, :K].argmax()
    seen = step(method, {"target": {**fields["target"], "weak_boxes": boxes, "weak_box_labels": labels}})
    assert all(torch.equal(seen[name], blind[name]) for name in blind)
    assert 1 / B <= method.logged["low_confidence_right"] <= method.logged["low_confidence"]
    nothing = {**fields["target"], "weak_boxes": boxes, "weak_box_labels": torch.full((B, 1), -1)}
    step(method, {"target": nothing})
    assert method.logged["low_confidence_right"] == method.logged["confident_right"] == 0


@pytest.mark.parametrize("setting", [{"score": 1.5}, {"iou": -0.1}, {"ema_decay": 2.0}, {"background": 99}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        LPLD(source(), **setting)


def test_a_detector_that_scores_no_given_boxes_is_refused():
    with pytest.raises(UserError, match="give a two-stage detector"):
        LPLD(nn.Linear(2, 2))


def test_decoding_of_the_class_takes_the_capped_scale():
    answer = scored()
    answer.logits[..., 0], answer.deltas[..., 0, :] = 50.0, torch.tensor([0.0, 0.0, 1e3, 1e3])
    box = proposals().boxes
    torch.testing.assert_close(refined_boxes(box, answer), decode_boxes(answer.deltas[..., 0, :], box))
    size = refined_boxes(box, answer)[..., 2] - refined_boxes(box, answer)[..., 0]
    torch.testing.assert_close(size, (box[..., 2] - box[..., 0]) * 62.5)
