"""DHO: which loss reaches which head, how the heads are mixed, and how the mixture is chosen.

Letters: B labelled and U unlabelled samples, N validation samples, C classes, D width of the features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from limbeck.data import Identity, Samples, Stream, Weak
from limbeck.errors import UserError
from limbeck.evaluate import ClassificationEvaluator
from limbeck.methods.few_labels.dho import ALPHAS, BETAS, DHO, CosineHead, TwoHeads, best_mix, mix
from limbeck.models import Outputs
from limbeck.teachers import Frozen, Teacher
from limbeck.train import Batch, Clock, Losses, Optimizer, Trainer, fit

B, U, C, D = 4, 6, 5, 8


class Given(Teacher):
    """A teacher whose logits lie in the batch."""

    def __call__(self, fields: Mapping[str, Any], view: str) -> Outputs:
        return Outputs(logits=fields["teacher_logits"])


def net(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, D), nn.BatchNorm1d(D) if norm else nn.Tanh(), nn.Linear(D, C)]
    return nn.Sequential(*layers)


def batch(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def stream(size: int) -> dict[str, Tensor]:
        weak = torch.rand(size, 1, 4, 4, generator=generator)
        return {"weak": weak, "teacher_logits": 3 * torch.randn(size, C, generator=generator)}

    return {"labelled": {**stream(B), "label": torch.randint(C, (B,), generator=generator)}, "unlabelled": stream(U)}


def total(method: DHO, losses: Losses) -> Tensor:
    return sum(method.now(method.weights.get(name, 1.0)) * value for name, value in losses.items())


def kd(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    student, teacher = (student_BC / temperature).log_softmax(-1), (teacher_BC / temperature).softmax(-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean")


# -- the loss -------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(ce_weight=st.floats(0, 1), temperature=st.floats(0.5, 10), seed=st.integers(0, 1000))
def test_loss_is_labels_on_one_head_and_the_teacher_on_the_other_for_both_streams(ce_weight, temperature, seed):
    method, data = DHO(net(seed), Given(), ce_weight=ce_weight, temperature=temperature), batch(seed)
    got = total(method, method.training_step(data))
    parts = method.student
    h_l, h_u = (parts.backbone(data[stream]["weak"]) for stream in ("labelled", "unlabelled"))
    ce = F.cross_entropy(parts.ce_head(h_l), data["labelled"]["label"])
    both = kd(parts.kd_head(h_l), data["labelled"]["teacher_logits"], temperature) + kd(
        parts.kd_head(h_u), data["unlabelled"]["teacher_logits"], temperature
    )
    torch.testing.assert_close(got, ce_weight * ce + (1 - ce_weight) * both, rtol=1e-4, atol=1e-5)


def test_neither_head_sees_the_others_target_and_the_backbone_sees_both():
    method = DHO(net(), Given())
    losses = method.training_step(batch())
    heads = {"ce": method.student.ce_head, "kd": method.student.kd_head}
    backbone = list(method.student.backbone.parameters())
    for name, loss in losses.items():
        mine, other = heads[name[:2]], heads["kd" if name == "ce" else "ce"]
        weights = [mine.weight, other.weight, *backbone]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        assert gradients[0].any() and gradients[1] is None
        assert all(gradient.any() for gradient in gradients[2:])


def test_at_its_ends_lambda_leaves_one_head_without_gradient():
    for ce_weight, still in ((1.0, "kd_head"), (0.0, "ce_head")):
        method = DHO(net(), Given(), ce_weight=ce_weight)
        total(method, method.training_step(batch())).backward()
        for name in ("ce_head", "kd_head"):
            assert getattr(method.student, name).weight.grad.any() == (name != still)


def test_labels_of_unlabelled_samples_are_never_read():
    with_labels = batch()
    with_labels["unlabelled"]["label"] = torch.full((U,), 99)
    assert DHO(net(), Given()).training_step(batch()) == DHO(net(), Given()).training_step(with_labels)


def test_labels_reach_the_cross_entropy_only():
    data, other = batch(), batch()
    other["labelled"]["label"] = (data["labelled"]["label"] + 1) % C
    first, second = DHO(net(), Given()).training_step(data), DHO(net(), Given()).training_step(other)
    assert [first[name] == second[name] for name in ("ce", "kd_labelled", "kd_unlabelled")] == [False, True, True]


@settings(max_examples=25, deadline=None)
@given(temperature=st.floats(0.5, 20), shift=st.floats(-20, 20))
def test_divergence_is_zero_when_the_head_says_what_the_teacher_says_but_for_a_constant(temperature, shift):
    method, data = DHO(net(), Given(), temperature=temperature), batch()
    for fields in data.values():
        logits_BC = method.student.kd_head(method.student.backbone(fields["weak"]))
        fields["teacher_logits"] = logits_BC.detach() + shift
    losses = method.training_step(data)
    assert losses["kd_labelled"].abs() < 1e-3 and losses["kd_unlabelled"].abs() < 1e-3
    assert losses["ce"] > 0.1


def test_the_gradient_keeps_its_size_as_the_temperature_grows():
    sizes = []
    for temperature in (20.0, 40.0, 80.0):
        method = DHO(net(), Given(), temperature=temperature)
        method.training_step(batch())["kd_unlabelled"].backward()
        sizes.append(method.student.kd_head.weight.grad.norm().item())
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.1)  # without T^2 each would be a quarter of the one before


def test_with_one_head_it_is_plain_distillation_and_the_student_ships_as_it_was():
    student, data = net(), batch()
    reference = copy.deepcopy(student)
    method = DHO(student, Given(), heads=1, ce_weight=0.3)
    loss = total(method, method.training_step(data))
    z_l, z_u = reference(data["labelled"]["weak"]), reference(data["unlabelled"]["weak"])
    want = 0.3 * F.cross_entropy(z_l, data["labelled"]["label"]) + 0.7 * (
        kd(z_l, data["labelled"]["teacher_logits"], 2.0) + kd(z_u, data["unlabelled"]["teacher_logits"], 2.0)
    )
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    torch.testing.assert_close(method.student.ce_head.weight.grad, reference[3].weight.grad)
    torch.testing.assert_close(method.student.backbone[1].weight.grad, reference[1].weight.grad)
    assert torch.equal(method.shipped()(data["labelled"]["weak"]), z_l)
    assert sum(p.numel() for p in method.parts()["student"]) == sum(p.numel() for p in reference.parameters())


def test_labelled_and_unlabelled_samples_have_batch_statistics_of_their_own_unless_they_go_together():
    for joint, forwards in ((False, 2), (True, 1)):
        method = DHO(net(norm=True), Given(), joint_forward=joint)
        method.training_step(batch())
        assert method.student.backbone[2].num_batches_tracked == forwards


def test_a_joint_forward_changes_nothing_where_samples_do_not_mix():
    apart = DHO(net(), Given()).training_step(batch())
    together = DHO(net(), Given(), joint_forward=True).training_step(batch())
    for name in apart:
        torch.testing.assert_close(apart[name], together[name])


def test_teacher_and_student_see_the_same_augmented_picture():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, C))
    teacher = copy.deepcopy(student)
    pictures = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    data = {}
    for name in ("labelled", "unlabelled"):
        stream = Stream(Samples({"image": pictures, "label": torch.arange(8) % C}), 8, {"weak": Weak(padding=3)})
        stream.open(name, seed=0)
        data[name] = stream.render(stream.next())
    method = DHO(student, Frozen(teacher))
    method.student.kd_head.load_state_dict(teacher[1].state_dict())
    losses = method.training_step(data)
    assert losses["kd_labelled"].abs() < 1e-6 and losses["kd_unlabelled"].abs() < 1e-6


def test_the_teacher_is_no_part_of_the_method():
    teacher = net(1)
    method = DHO(net(), Frozen(teacher))
    assert {p.data_ptr() for p in method.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
    assert all(name.startswith("student.") for name in method.state_dict())


# -- heads ----------------------------------------------------------------------------------------------------------


def test_the_cosine_head_scales_the_unit_feature_and_leaves_its_rows_free():
    torch.manual_seed(0)
    head, features_BD = CosineHead(D, C), torch.randn(B, D)
    head.weight.data *= 3
    unit_BD = features_BD / features_BD.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(head(features_BD), 100 * (unit_BD @ head.weight.T + head.bias))
    torch.testing.assert_close(head(7 * features_BD), head(features_BD))


def test_only_the_teachers_head_of_a_clip_like_student_normalises_its_feature():
    embeddings_CD = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
    method = DHO(net(), Given(), kd_head="cosine", class_embeddings=embeddings_CD, joint_forward=True)
    a, b = method.student.ce_head, method.student.kd_head
    for head in (a, b):
        assert torch.equal(head.weight, embeddings_CD) and not head.bias.any()
    assert a.weight.data_ptr() != b.weight.data_ptr()
    h = torch.randn(B, D)
    torch.testing.assert_close(a(h), h @ embeddings_CD.T)
    torch.testing.assert_close(b(h), 100 * F.normalize(h, dim=-1) @ embeddings_CD.T)


def test_class_embeddings_that_lie_the_wrong_way_are_refused():
    with pytest.raises(UserError, match=rf"\[{D}, {C}\].*\[{C}, {D}\].*one row a class"):
        DHO(net(), Given(), class_embeddings=torch.randn(D, C))


@pytest.mark.parametrize("setting", [{"alpha": 0.5}, {"beta": 0.5}, {"temperature": 0.0}, {"ce_weight": 1.5}])
def test_settings_that_cannot_be_are_refused_at_the_door(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        DHO(net(), Given(), **setting)


# -- the mixture ----------------------------------------------------------------------------------------------------


def logits(seed: int, size: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """(a_NC, b_NC, labels_N), each head right for some samples."""
    generator = torch.Generator().manual_seed(seed)
    a_NC, b_NC = 2 * torch.randn(2, size, C, generator=generator)
    labels_N = torch.randint(C, (size,), generator=generator)
    hint_NC = F.one_hot(labels_N, C)
    return a_NC + 2 * hint_NC * torch.rand(size, 1, generator=generator), b_NC + 2 * hint_NC, labels_N


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(0, 1), beta=st.floats(0.25, 4))
def test_mixture_is_of_probabilities_and_beta_sharpens_the_teachers_head_only(seed, alpha, beta):
    a_NC, b_NC, _ = logits(seed)
    want = alpha * a_NC.softmax(-1) + (1 - alpha) * (b_NC / beta).softmax(-1)
    torch.testing.assert_close(mix(a_NC, b_NC, alpha, beta).exp(), want)
    torch.testing.assert_close(mix(a_NC, b_NC, 1.0, beta), a_NC.log_softmax(-1))
    torch.testing.assert_close(mix(a_NC, b_NC, 0.0, beta), (b_NC / beta).log_softmax(-1))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(0, 1))
def test_equal_heads_mix_to_either(seed, alpha):
    a_NC, _, _ = logits(seed)
    torch.testing.assert_close(mix(a_NC, a_NC, alpha, 1.0), a_NC.log_softmax(-1))


def test_mixing_probabilities_is_not_averaging_logits():
    a_NC, b_NC = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0.0, 1.2, 1]])
    assert mix(a_NC, b_NC, 0.2, 1.0).argmax() == 1
    assert (0.2 * a_NC + 0.8 * b_NC).argmax() == 0


def test_a_mixture_is_finite_where_both_heads_are_sure_of_another_class():
    a_NC, b_NC = torch.tensor([[1e4, 0, 0]]), torch.tensor([[0, 1e4, 0]])
    assert mix(a_NC, b_NC, 0.5, 0.5).isfinite().all()


def test_what_ships_mixes_both_heads():
    method, image = DHO(net(), Given(), alpha=0.4, beta=0.5), batch()["labelled"]["weak"]
    h = method.student.backbone(image)
    want = mix(method.student.ce_head(h), method.student.kd_head(h), 0.4, 0.5)
    torch.testing.assert_close(method.shipped()(image), want)


def looped_search(a_NC: Tensor, b_NC: Tensor, labels_N: Tensor) -> tuple[float, float, int]:
    """(alpha, beta, right answers) of the official search: beta outside, alpha inside, only better ones taken."""
    best = (0.0, 1.0, 0)
    for beta in BETAS:
        for alpha in ALPHAS:
            p_NC = alpha * a_NC.softmax(-1) + (1 - alpha) * (b_NC / beta).softmax(-1)
            right = int((p_NC.argmax(-1) == labels_N).sum())
            if right > best[2]:
                best = (alpha, beta, right)
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_grid_search_is_the_official_one_and_at_least_as_good_as_either_head(seed):
    a_NC, b_NC, labels_N = logits(seed)
    alpha, beta = best_mix(a_NC, b_NC, labels_N)
    want_alpha, want_beta, want_right = looped_search(a_NC, b_NC, labels_N)
    right = int((mix(a_NC, b_NC, alpha, beta).argmax(-1) == labels_N).sum())
    assert (alpha.item(), beta.item(), right) == (pytest.approx(want_alpha), want_beta, want_right)
    assert right >= max(int((head.argmax(-1) == labels_N).sum()) for head in (a_NC, b_NC))


def test_the_grid_is_the_papers():
    assert [round(alpha, 2) for alpha in ALPHAS] == [round(0.05 * i, 2) for i in range(21)]
    assert BETAS == (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


def test_a_perfect_head_is_found_at_either_end():
    labels_N = torch.arange(40) % C
    right_NC, wrong_NC = 9.0 * F.one_hot(labels_N, C), 20.0 * F.one_hot((labels_N + 1) % C, C)
    assert best_mix(right_NC, wrong_NC, labels_N)[0] > 0.5
    assert best_mix(wrong_NC, right_NC, labels_N)[0] < 0.5


def validation(seed: int = 0, size: int = 50) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(size, 1, 4, 4, generator=generator), torch.randint(C, (size,), generator=generator)
    return [{"weak": i, "label": y} for i, y in zip(images.split(20), labels.split(20), strict=True)]


def heads_on(student: TwoHeads, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    h = student.backbone(torch.cat([fields["weak"] for fields in batches]))
    return student.ce_head(h), student.kd_head(h), torch.cat([fields["label"] for fields in batches])


def test_tuning_takes_the_best_pair_over_all_validation_batches():
    method, batches = DHO(net(), Given()), validation()
    method.tune(iter(batches))
    with torch.no_grad():
        alpha, beta, right = looped_search(*heads_on(method.student, batches))
        predictions = torch.cat([method.shipped()(fields["weak"]).argmax(-1) for fields in batches])
    assert method.student.alpha == pytest.approx(alpha) and method.student.beta == beta
    assert (predictions == torch.cat([fields["label"] for fields in batches])).sum() == right


def test_a_mixture_that_is_fixed_is_not_tuned():
    method = DHO(net(), Given(), alpha=0.2, beta=0.5)
    method.tune(validation())
    assert method.student.alpha == pytest.approx(0.2) and method.student.beta == 0.5


def test_without_validation_data_the_teachers_head_speaks_alone():
    method, image = DHO(net(), Given()), batch()["labelled"]["weak"]
    method.tune([])
    want = method.student.kd_head(method.student.backbone(image)).log_softmax(-1)
    torch.testing.assert_close(method.shipped()(image), want)


# -- the conflict of gradients ---------------------------------------------------------------------------------------


def test_the_conflict_is_the_cosine_of_both_pulls_on_the_backbone():
    method = DHO(net(), Given(), measure_conflict=True)
    losses = method.training_step(batch())
    pulls = []
    for names in (["ce"], ["kd_labelled", "kd_unlabelled"]):
        method.zero_grad()
        sum(losses[name] for name in names).backward(retain_graph=True)
        pulls.append(torch.cat([p.grad.flatten() for p in method.student.backbone.parameters()]))
    cosine = method.logged["gradient_cosine"]
    torch.testing.assert_close(cosine, pulls[0] @ pulls[1] / (pulls[0].norm() * pulls[1].norm()))
    assert -1 <= cosine <= 1


def test_the_conflict_is_measured_once_an_epoch_and_leaves_no_gradient():
    method = DHO(net(), Given(), measure_conflict=True)
    for step in range(6):
        method.clock, method.logged = Clock(step=step, steps=6, steps_per_epoch=3), {}
        method.training_step(batch())
        assert ("gradient_cosine" in method.logged) == (step in (0, 3))
    assert all(p.grad is None for p in method.parameters())


class WithSpareLayer(nn.Module):
    """A network that holds a layer it does not use, as transformers models hold a pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.net = nn.Linear(2, 2), net()

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def test_a_layer_that_the_student_does_not_use_is_no_part_of_the_conflict():
    method, reference = (DHO(student, Given(), measure_conflict=True) for student in (WithSpareLayer(), net()))
    method.student.kd_head.load_state_dict(reference.student.kd_head.state_dict())
    for each in (method, reference):
        each.training_step(batch())
    torch.testing.assert_close(method.logged["gradient_cosine"], reference.logged["gradient_cosine"])


def test_opposite_targets_pull_one_head_apart_and_two_heads_less():
    """Of two classes the teacher is sure of the one that is not the label."""
    cosines_HS = torch.zeros(2, 8)
    for heads in (1, 2):
        for seed in range(8):
            data = batch(seed)
            data["labelled"]["label"] %= 2
            data["labelled"]["teacher_logits"] = 20.0 * F.one_hot(1 - data["labelled"]["label"], 2)
            data["unlabelled"] = {name: data["labelled"][name] for name in ("weak", "teacher_logits")}
            torch.manual_seed(seed)
            student = nn.Sequential(nn.Flatten(), nn.Linear(16, D), nn.Tanh(), nn.Linear(D, 2))
            method = DHO(student, Given(), heads=heads, measure_conflict=True)
            method.training_step(data)
            cosines_HS[heads - 1, seed] = method.logged["gradient_cosine"]
    assert (cosines_HS[0] < 0).all()
    assert cosines_HS[1].mean() > cosines_HS[0].mean() + 0.5


# -- a run ----------------------------------------------------------------------------------------------------------


class Remembering(DHO):
    """Keeps the validation accuracy of each head alone, as it was at each evaluation."""

    def tune(self, validation: Any) -> None:
        batches = list(validation)
        super().tune(batches)
        with torch.no_grad():
            *heads, labels = heads_on(self.student, batches)
        self.alone = [float((head.argmax(-1) == labels).float().mean()) for head in heads]


def test_after_a_run_the_mixture_is_at_least_as_accurate_on_validation_data_as_either_head():
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(C, 1, 4, 4, generator=generator)

    def samples(size: int) -> Samples:
        labels = torch.randint(C, (size,), generator=generator)
        images = (centres[labels] + 0.4 * torch.randn(size, 1, 4, 4, generator=generator)).clamp(0, 1)
        return Samples({"image": images, "label": labels}, classes=list("abcde"))

    streams = {
        "labelled": Stream(samples(10), 16, {"weak": Identity()}, cycle=True),
        "unlabelled": Stream(samples(64), 16, {"weak": Identity()}),
    }
    method = Remembering(net(), Frozen(net(1)))
    trainer = Trainer(epochs=3, optimizer=Optimizer("adamw", lr=1e-2), accelerator="cpu", log_every=1)
    result = fit(method, streams, trainer, validation=samples(100), evaluator=ClassificationEvaluator())
    assert result.steps == 3 * 4  # the unlabelled samples make the epoch
    assert result.metrics["accuracy"] >= max(method.alone) - 1e-6


def test_batches_of_the_streams_may_differ_in_size() -> None:
    data: Batch = batch()
    assert len(data["labelled"]["weak"]) != len(data["unlabelled"]["weak"])
    losses = DHO(net(), Given(), joint_forward=True).training_step(data)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
