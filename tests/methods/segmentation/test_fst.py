"""FST: what the teacher absorbs, what goes back, and what the two base losses count.

Most identities hold a network of one 1x1 convolution against the algorithm written out by hand; plain SGD without
momentum, so that a step is theta - eta g.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples, Stream, make_view
from limbeck.errors import UserError
from limbeck.methods.segmentation.fst import FST, renormalized_cross_entropy
from limbeck.models import MiniDeepLab, load_segmenter
from limbeck.train import Loop, Optimizer, Trainer
from limbeck.train.checkpoint import seed_everything
from tests.train.toys import differing, weights_of

B, C, H, W = 2, 3, 8, 12
ETA = 0.3


def batch(seed: int = 0, rows: int = B) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    image, other = torch.rand(2, rows, 3, H, W, generator=generator)
    other = other + 4 * torch.randn(rows, 3, 1, 1, generator=generator)  # so that networks see different classes
    mask = torch.randint(C, (rows, H, W), generator=generator)
    mask[:, :2] = 255
    return {
        "labelled": {"weak": image, "weak_mask": mask},
        "unlabelled": {"weak": other, "weak_hidden_mask": torch.randint(C, (rows, H, W), generator=generator)},
    }


def pixel_net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv2d(3, C, 1)


def norm_net(seed: int = 1, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(dropout), nn.Conv2d(4, C, 1))


def parameters(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def drive(method: FST, of: dict, look: Callable[[int], None] = lambda turn: None, momentum: float = 0.0) -> int:
    """One iteration as the loop runs it; `look(turn)` is called at every yield, before that turn's update."""
    optimizer = method.optimizers.get("student") or torch.optim.SGD(method.parts()["student"], ETA, momentum=momentum)
    method.optimizers = {"student": optimizer}
    method.train()
    turn = 0
    for part, losses in method.training_step(of):
        assert part == "student"
        look(turn)
        optimizer.zero_grad()
        sum(losses[name] * method.weights.get(name, 1.0) for name in losses).backward()
        optimizer.step()
        turn += 1
    method.clock.step += 1
    return turn


def fst(net: nn.Module | None = None, **settings: Any) -> FST:
    """Without warm-up and without the epoch in which the teacher is the student, unless a test asks for them."""
    settings = {"ema_decay": 0.9, "ema_counter": "constant", "follow_epochs": 0, **settings}
    method = FST(net or pixel_net(), **settings)
    method.clock.step = 1 if settings.get("flavour") == "uda" else 0
    return method


# ---------------------------------------------------------------- the look-ahead


def quadratic(method: FST, goal: list[Tensor]) -> None:
    """Replace the base loss by 1/2 |theta - goal|^2, so that steps have closed forms."""

    def losses(of: Any, *, real: bool = False) -> dict[str, Tensor]:
        student = method.student.parameters()
        return {"ce": sum((0.5 * (p - g).square().sum() for p, g in zip(student, goal, strict=True)), torch.zeros(()))}

    method._losses = losses  # type: ignore[method-assign]


@pytest.mark.parametrize("flavour", ["ssl", "uda"])
@pytest.mark.parametrize(("look_ahead", "ahead"), [("deep", 1), ("deep", 3), ("wide", 2)])
def test_before_the_real_step_the_student_is_what_it_was_and_the_teacher_is_not(flavour, look_ahead, ahead):
    method = fst(flavour=flavour, look_ahead=look_ahead, ahead_steps=ahead)
    with torch.no_grad():
        method.student.weight += 0.1  # so that teacher and student differ from the start
    theta, phi = parameters(method.student), parameters(method.ema.model)
    seen: list[bool] = []

    def look(turn: int) -> None:
        seen.append(equal(parameters(method.student), theta))
        if turn == ahead:
            assert not equal(parameters(method.ema.model), phi)

    assert drive(method, batch(rows=2 * 3), look) == ahead + 1
    assert seen[0] and seen[-1]
    if look_ahead == "deep":
        assert seen[1:-1] == [False] * (ahead - 1)
    else:
        assert all(seen)  # every virtual step starts from the snapshot


def test_the_teacher_after_one_virtual_step_has_its_closed_form():
    method = fst(ahead_steps=1, flavour="uda")
    goal = [torch.randn_like(p) for p in method.student.parameters()]
    quadratic(method, goal)
    with torch.no_grad():
        method.student.weight += 0.5
    theta, phi, a = parameters(method.student), parameters(method.ema.model), 0.9
    drive(method, batch())
    for t, f, g, now in zip(theta, phi, goal, method.ema.model.parameters(), strict=True):
        virtual = t - ETA * (t - g)
        torch.testing.assert_close(now.detach(), a * a * f + a * (1 - a) * t + (1 - a) * virtual)


def test_with_labels_few_the_teacher_moves_once_more_behind_the_real_step():
    goal = [torch.randn_like(p) for p in pixel_net().parameters()]
    moves = {}
    for flavour in ("ssl", "uda"):
        method = fst(ahead_steps=2, flavour=flavour)
        quadratic(method, goal)
        drive(method, batch())
        moves[flavour] = (parameters(method.ema.model), parameters(method.student))
    (ssl, theta), (uda, _) = moves["ssl"], moves["uda"]
    for s, u, t in zip(ssl, uda, theta, strict=True):
        torch.testing.assert_close(s, 0.9 * u + 0.1 * t)


def test_wide_and_identical_futures_give_the_soup_of_one_step():
    goal = [torch.randn_like(p) for p in pixel_net().parameters()]
    theta = parameters(pixel_net())
    for ahead in (1, 3):
        method = fst(look_ahead="wide", ahead_steps=ahead)
        quadratic(method, goal)
        phi = parameters(method.ema.model)
        absorbed: list[list[Tensor]] = []
        drive(method, batch(rows=12), lambda turn, m=method, a=absorbed: a.append(parameters(m.ema.model)))
        for f, t, g, now in zip(phi, theta, goal, absorbed[-1], strict=True):
            torch.testing.assert_close(now, 0.9 * f + 0.1 * (t - ETA * (t - g)))


def test_wide_gives_each_future_student_its_own_batch_and_the_teacher_their_mean():
    method = fst(look_ahead="wide", ahead_steps=3, ema_decay=0.0)  # the teacher becomes the soup itself
    of = batch(rows=8)
    given: list[Tensor] = []
    students: list[list[Tensor]] = []
    base = method._losses

    def losses(group: Any, *, real: bool = False) -> dict[str, Tensor]:
        given.append(group["labelled"]["weak"])
        return base(group, real=real)

    method._losses = losses  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(method.student.parameters(), ETA)
    soup: list[Tensor] = []
    for turn, (_, terms) in enumerate(method.training_step(of)):
        if turn == 3:
            soup = parameters(method.ema.model)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        students.append(parameters(method.student))
    chunks = of["labelled"]["weak"].chunk(4)
    assert all(torch.equal(g, chunks[i]) for g, i in zip(given, [1, 2, 3, 0], strict=True))
    for place, mean in enumerate(soup):
        torch.testing.assert_close(mean, torch.stack([student[place] for student in students[:3]]).mean(0))


def test_no_step_ahead_is_the_mean_teacher_bit_for_bit():
    method = FST(norm_net(), ahead_steps=0, ema_decay=0.9, follow_epochs=0)
    method.clock.steps_per_epoch = 100
    student, teacher = norm_net().train(), norm_net()
    optimizer = torch.optim.SGD(student.parameters(), ETA)
    mixed = []
    for step in range(6):
        of = batch(step)
        seed_everything(step)
        drive(method, of)
        seed_everything(step)
        mixed.append(plain_mean_teacher(student, teacher, optimizer, of, decay=min(0.9, 1 - 1 / (step + 1))))
    assert set(mixed) == {True, False}
    assert not differing(weights_of(method.student), weights_of(student))
    assert not differing(weights_of(method.ema.model), weights_of(teacher))


def plain_mean_teacher(student: nn.Module, teacher: nn.Module, optimizer: Any, of: Any, decay: float) -> bool:
    """The official script's ordinary step, written out: labels, CutMix, entropy filter, step, moving average.

    Returns whether mixing changed the labels.
    """
    from limbeck.data import box_mix

    images, others = of["labelled"]["weak"], of["unlabelled"]["weak"]
    with torch.no_grad():
        label = teacher.eval()(others).softmax(1).argmax(1)
    mix = box_mix(B, (H, W))
    unmixed = label
    if torch.rand(1) < 0.5:
        others, label = mix.pixels(others), mix.pixels(label)
    changed = not torch.equal(label, unmixed)
    logits = student(torch.cat([images, others]))
    with torch.no_grad():
        p = teacher.train()(torch.cat([images, others]))[B:].softmax(1)
    entropy = -torch.special.xlogy(p, p).sum(1)
    label[entropy >= torch.quantile(entropy, 0.8)] = 255
    kept = (label != 255).sum()
    unsup = F.cross_entropy(logits[B:], label, ignore_index=255) * (label.numel() / kept)
    optimizer.zero_grad()
    (F.cross_entropy(logits[:B], of["labelled"]["weak_mask"], ignore_index=255) + unsup).backward()
    optimizer.step()
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)
    return changed


def test_with_alpha_one_the_teacher_never_moves_and_looking_ahead_changes_nothing():
    ended = []
    for ahead in (0, 2):
        method = fst(ahead_steps=ahead, ema_decay=1.0, mix_probability=0.0)
        phi = parameters(method.ema.model)
        for step in range(3):
            drive(method, batch(step))
        assert equal(parameters(method.ema.model), phi)
        ended.append(parameters(method.student))
    assert equal(*ended)


@pytest.mark.parametrize("rollback", [True, False])
def test_the_optimizer_goes_back_only_when_asked(rollback):
    ended = []
    for ahead in (0, 2):
        method = fst(ahead_steps=ahead, ema_decay=1.0, mix_probability=0.0, rollback_optimizer=rollback)
        for step in range(3):
            drive(method, batch(step), momentum=0.9)
        ended.append(parameters(method.student))
    assert equal(*ended) == rollback  # with a still teacher virtual steps can only act through the momentum


@pytest.mark.parametrize(("ahead", "turns"), [(0, 1), (1, 2), (3, 4)])
def test_an_iteration_has_one_update_more_than_steps_ahead(ahead, turns):
    assert drive(fst(ahead_steps=ahead), batch()) == turns
    assert drive(fst(ahead_steps=ahead, flavour="uda"), batch()) == turns


def test_the_first_iteration_of_uda_looks_not_ahead():
    method = fst(flavour="uda", ahead_steps=3)
    method.clock.step = 0
    assert drive(method, batch()) == 1
    assert drive(method, batch()) == 4


@pytest.mark.parametrize("flavour", ["ssl", "uda"])
def test_no_gradient_reaches_the_teacher_and_only_the_student_is_trained(flavour):
    method = fst(flavour=flavour, ahead_steps=1)
    drive(method, batch())
    assert all(p.grad is None and not p.requires_grad for p in method.ema.parameters())
    assert len(method.parts()["student"]) == len(list(method.student.parameters()))


def test_the_counter_of_uda_counts_every_forward_and_that_of_ssl_iterations():
    seen: dict[str, list[int]] = {}
    for flavour in ("ssl", "uda"):
        method = FST(pixel_net(), flavour=flavour, ahead_steps=3)
        update = method.ema.update
        seen[flavour] = []
        method.ema.update = lambda net, t, log=seen[flavour], update=update: (log.append(t), update(net, t))
        for step in range(3):
            drive(method, batch(step))
    assert seen["uda"] == [1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert seen["ssl"] == [0] * 5 + [1] * 5 + [2] * 5


def test_while_it_follows_the_teacher_labels_as_the_student_would():
    method = fst(ahead_steps=1, follow_epochs=1)
    method.clock.steps_per_epoch = 2
    same: list[bool] = []
    for step in range(3):
        both = (method.ema.model, method.student)
        drive(method, batch(step), lambda turn, both=both: same.append(equal(*map(parameters, both))))
    assert same == [True] * 4 + [False] * 2


def test_supervised_epochs_use_no_pseudo_labels_and_no_look_ahead():
    method = FST(norm_net(), ahead_steps=2, supervised_epochs=1)
    method.clock.steps_per_epoch = 1
    before = method.ema.model[1].running_mean.clone()
    assert drive(method, {"labelled": batch()["labelled"], "unlabelled": {}}) == 1
    assert equal(parameters(method.ema.model), parameters(method.student))
    assert not torch.equal(method.ema.model[1].running_mean, before)  # its own statistics go on
    assert drive(method, batch()) == 3


# ---------------------------------------------------------------- the base losses


def ssl_losses(method: FST, of: dict) -> dict[str, Tensor]:
    method.train()
    return method._losses(of)


def test_labelled_and_unlabelled_pictures_share_one_batchnorm_batch():
    net = norm_net()
    method = fst(net, mix_probability=0.0)
    of = batch()
    together = torch.cat([of["labelled"]["weak"], of["unlabelled"]["weak"]])
    expected = net[0](together).mean((0, 2, 3)).detach()
    ssl_losses(method, of)
    assert method.student[1].num_batches_tracked == 1
    torch.testing.assert_close(method.student[1].running_mean, 0.1 * expected)
    assert method.ema.model[1].num_batches_tracked == 1  # the teacher's own forward, not the student's buffers
    torch.testing.assert_close(method.ema.model[1].running_mean, 0.1 * expected)


def test_the_pseudo_loss_is_over_the_certain_pixels_and_larger_by_the_share_that_is_dropped():
    logits = torch.randn(B, C, H, W)
    mask = torch.randint(C, (B, H, W))
    mask[:, : H // 4] = 255
    plain = F.cross_entropy(logits, mask, ignore_index=255)
    torch.testing.assert_close(renormalized_cross_entropy(logits, mask), plain * 4 / 3)
    assert renormalized_cross_entropy(logits, torch.full_like(mask, 255)) == 0


def test_the_entropy_filter_drops_a_fifth_of_the_pixels():
    net = pixel_net()
    of = batch()
    method = fst(net, mix_probability=0.0)
    logits, label = net(of["unlabelled"]["weak"]), net(of["unlabelled"]["weak"]).argmax(1)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)
    certain = entropy < torch.quantile(entropy, 0.8)
    assert abs(int(certain.sum()) - 0.8 * label.numel()) <= 1
    expected = F.cross_entropy(logits, label, reduction="none")[certain].mean() * label.numel() / certain.sum()
    torch.testing.assert_close(ssl_losses(method, of)["pseudo"], expected)


def test_cutmix_is_done_for_the_whole_batch_or_not_at_all():
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = pixel_net(), []

        def forward(self, image):
            self.seen.append(image)
            return self.inner(image)

    of = batch()
    mixed = []
    for probability in (0.0, 1.0):
        method = fst(Spy(), mix_probability=probability)
        ssl_losses(method, of)
        mixed.append(method.student.seen[-1][B:])
    assert torch.equal(mixed[0], of["unlabelled"]["weak"])
    changed = (mixed[1] != of["unlabelled"]["weak"]).any(1).flatten(1).float().mean(1)
    assert ((changed > 0.3) & (changed < 0.7)).all()  # half of every picture comes from the next one


def test_uda_weighs_target_pixels_by_the_confident_share_and_source_pixels_by_one(monkeypatch):
    import limbeck.methods.segmentation.fst as module

    monkeypatch.setattr(module, "RECOLOUR", lambda images: images)
    drawn = torch.zeros(B, H, W, dtype=torch.bool)
    drawn[:, :, : W // 2] = True
    monkeypatch.setattr(module, "class_mask", lambda mask, of: drawn)
    net, of = pixel_net(), batch()
    source, target = of["labelled"], of["unlabelled"]["weak"]
    p = net(target).detach().softmax(1)
    threshold = float(p.amax(1).median())
    method = fst(net, flavour="uda", threshold=threshold, ignore_rows=(1, 2))
    losses = method._losses(of)
    share = (p.amax(1) >= threshold).float().mean()
    weight = torch.where(drawn, 1.0, share)
    weight[:, :1, W // 2 :] = weight[:, -2:, W // 2 :] = 0
    mixed = torch.where(drawn[:, None], source["weak"], target)
    label = torch.where(drawn, source["weak_mask"], p.argmax(1))
    items = F.cross_entropy(net(mixed), label, ignore_index=255, reduction="none")
    torch.testing.assert_close(losses["pseudo"], (items * weight).mean())  # over all pixels, ignored ones too
    items = F.cross_entropy(net(source["weak"]), source["weak_mask"], ignore_index=255, reduction="none")
    torch.testing.assert_close(losses["ce"], items.mean())


def test_the_uda_teacher_normalises_by_the_batch_and_drops_nothing_out():
    method = fst(norm_net(dropout=0.9), flavour="uda")
    method.train()
    method._losses(batch())
    assert method.ema.model[1].training and not method.ema.model[2].training
    assert method.ema.model[1].num_batches_tracked == 1


def test_the_accuracy_of_the_labels_is_logged_in_the_real_step_only():
    method, of = fst(ahead_steps=2), batch()
    logged: list[bool] = []

    def look(turn: int) -> None:
        logged.append("pseudo_accuracy" in method.logged)
        method.logged.clear()

    drive(method, of, look)
    assert logged == [False, False, True]


@pytest.mark.parametrize(
    "settings",
    [{"ahead_steps": 1}, {"ahead_steps": 1, "look_ahead": "wide"}],
    ids=["deep", "wide"],
)
def test_an_iteration_reads_nothing_back_from_the_device(settings):
    """The meta device has no values, so reading one back from it fails."""
    method = fst(norm_net(), **settings).to("meta")
    of = {stream: {name: value.to("meta") for name, value in fields.items()} for stream, fields in batch().items()}
    assert drive(method, of) == 2


# ---------------------------------------------------------------- in the loop


def streams(seed: int = 0, rows: int = B, classes: int = C) -> dict[str, Stream]:
    generator = torch.Generator().manual_seed(seed)
    names = [str(c) for c in range(classes)]
    image = torch.randint(0, 256, (12, 3, H, W), generator=generator, dtype=torch.uint8)
    mask = torch.randint(C, (12, H, W), generator=generator, dtype=torch.uint8)
    view = {"weak": make_view("crop_flip", scale=[0.8, 1.2])}
    return {
        "labelled": Stream(Samples({"image": image, "mask": mask}, names), rows, view, cycle=True),
        "unlabelled": Stream(Samples({"image": image}, names), rows, view),
    }


def trainer(**settings: Any) -> Trainer:
    settings = {"steps": 6, "optimizer": Optimizer(lr=0.05), "accelerator": "cpu", **settings}
    return Trainer(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"ahead_steps": 2}, {"ahead_steps": 1, "flavour": "uda"}, {"ahead_steps": 1, "look_ahead": "wide"}],
    ids=["deep", "uda", "wide"],
)
def test_a_run_that_was_broken_off_ends_with_the_same_weights(tmp_path, settings):
    def method() -> FST:
        return FST(norm_net(dropout=0.1), rollback_optimizer=True, **settings)

    whole = method()
    Loop(whole, streams(), trainer()).run()
    broken = Loop(method(), streams(), trainer(checkpoint_every=1), folder=tmp_path)
    for _ in range(3):
        broken.method.train()
        broken.started = 0.0
        broken.step()
    broken._save()
    resumed = method()
    Loop(resumed, streams(), trainer(), folder=tmp_path).run()
    assert not differing(weights_of(whole), weights_of(resumed))


def test_what_ships_is_the_teacher():
    method = fst()
    assert method.shipped() is method.ema.model


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ahead_steps": -1}, "ahead_steps=-1"),
        ({"drop_percent": 120.0}, "drop_percent=120"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"flavour": "uda", "supervised_epochs": 2}, "belongs to flavour ssl"),
    ],
)
def test_settings_out_of_range_are_refused_at_the_door(settings, said):
    with pytest.raises(UserError, match=said):
        FST(pixel_net(), **settings)


def test_what_does_not_fit_the_data_is_refused_before_the_first_step():
    with pytest.raises(UserError, match="4 groups from a batch of 'labelled'.*got 2 samples"):
        Loop(FST(pixel_net(), look_ahead="wide", ahead_steps=3), streams(), trainer())
    with pytest.raises(UserError, match="has 5 classes and the masks 3"):
        Loop(FST(MiniDeepLab(5)), streams(), trainer())
    without = {**streams(), "labelled": streams()["unlabelled"]}
    with pytest.raises(UserError, match="reads the field 'mask' of the stream 'labelled'"):
        Loop(FST(pixel_net()), without, trainer())


@pytest.mark.slow
def test_a_segformer_b2_makes_a_step():
    torch.manual_seed(0)
    config = {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}
    student = load_segmenter("hf-config:segformer", num_classes=19, config=config)
    assert 24e6 < sum(p.numel() for p in student.parameters()) < 30e6
    method = FST(student, ahead_steps=1)
    image, mask = torch.rand(1, 3, 128, 128), torch.randint(19, (1, 128, 128))
    of = {"labelled": {"weak": image, "weak_mask": mask}, "unlabelled": {"weak": image.flip(-1)}}
    before = copy.deepcopy(parameters(student))
    assert drive(method, of) == 2
    assert not equal(before, parameters(student)) and all(p.isfinite().all() for p in parameters(student))
