"""What one run of the loop computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from limbeck.errors import UserError
from limbeck.methods.classification.kd import KD
from limbeck.methods.few_labels.dho import DHO
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.teachers import Frozen
from limbeck.train import Clock, EarlyStop, Loop, Method, Optimizer, Schedule, Trainer, fit
from tests.train.toys import (
    CLASSES,
    Classify,
    Noisy,
    differing,
    norm_net,
    pictures,
    plain_net,
    stream,
    streams,
    trainer,
    two_streams,
    weights_of,
)


def test_a_run_equals_the_same_mathematics_written_by_hand():
    method, by_hand = Classify(plain_net()), plain_net()
    schedule = Schedule("cosine", warmup=2)
    fit(method, streams(), trainer(steps=8, schedule=schedule, channels_last=False))
    source = streams()["labelled"]
    source.open("labelled", seed=0)
    for step in range(8):
        batch = source.next()
        loss = F.cross_entropy(by_hand(batch["image"].float() / 255), batch["label"])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(by_hand.parameters(), gradients, strict=True):
                weight -= 0.1 * schedule(step, 8) * gradient
    for mine, theirs in zip(method.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# -- parts ------------------------------------------------------------------------------------------------------


class InTurn(Method):
    """A critic learns on the student's logits, then the student against the critic, both from one student forward."""

    def __init__(self, turns: tuple[str, ...] = ("critic", "student")) -> None:
        super().__init__()
        self.student, self.critic, self.idle = plain_net(), nn.Linear(CLASSES, 1), nn.Linear(2, 2)
        self.turns = turns
        self.seen: list[dict[str, bool]] = []

    def parts(self):
        return {name: list(getattr(self, name).parameters()) for name in ("student", "critic", "idle")}

    def training_step(self, batch):
        logits = self.student(batch["labelled"]["weak"])
        for turn in self.turns:
            before = {part: weights_of(getattr(self, part)) for part in self.parts()}
            # The critic's loss hangs on the student's graph, and is not cut off from it.
            sign = 1.0 if turn == "critic" else -1.0
            yield turn, {turn: sign * self.critic(logits).mean() + logits.square().mean()}
            moved = {part: bool(differing(before[part], weights_of(getattr(self, part)))) for part in self.parts()}
            self.seen.append(moved)


def test_only_the_yielded_part_moves_and_it_has_moved_before_the_next_is_asked_for():
    method = InTurn()
    fit(method, streams(), trainer(steps=2))
    critic = {"student": False, "critic": True, "idle": False}
    student = {"student": True, "critic": False, "idle": False}
    assert method.seen == [critic, student] * 2


def test_only_the_yielded_part_gets_gradients():
    method = InTurn(turns=("critic",))
    fit(method, streams(), trainer(steps=1))
    assert all(p.grad is None for p in [*method.student.parameters(), *method.idle.parameters()])
    assert all(p.grad is not None for p in method.critic.parameters())


def test_a_part_may_be_updated_several_times_in_a_step():
    class Twice(InTurn):
        def training_step(self, batch):
            for _ in range(2):
                yield "critic", {"critic": self.critic(self.student(batch["labelled"]["weak"])).mean()}

    method = Twice()
    before = method.critic.bias.item()
    fit(method, streams(), trainer(steps=1))
    assert method.critic.bias.item() == pytest.approx(before - 2 * 0.1)


def test_parts_have_their_own_optimisers():
    method = InTurn()
    before = weights_of(method.critic)
    fit(method, streams(), trainer(steps=1, optimizers={"critic": Optimizer(lr=0.0, momentum=0.0)}))
    assert not differing(before, weights_of(method.critic))
    assert method.seen[1]["student"]


def test_an_optimiser_for_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="'critc'.*student, critic, idle"):
        fit(InTurn(), streams(), trainer(optimizers={"critc": Optimizer()}))


def test_parts_in_turn_accumulate_like_one_big_batch():
    class Independent(InTurn):
        """Each part's loss is a mean over samples, so two halves average to the whole."""

        def training_step(self, batch):
            logits = self.student(batch["labelled"]["weak"])
            yield "critic", {"c": self.critic(logits.detach()).square().mean()}
            yield "student", {"s": self.critic(logits).mean() + F.cross_entropy(logits, batch["labelled"]["label"])}

    methods = [copy.deepcopy(Independent()) for _ in range(1)]
    methods.append(copy.deepcopy(methods[0]))
    fit(methods[0], streams(batch_size=8), trainer(steps=3))
    fit(methods[1], streams(batch_size=4), trainer(steps=3, accumulate=2))
    for one, two in zip(methods[0].parameters(), methods[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_that_yield_different_parts_are_refused():
    class Fickle(InTurn):
        calls = 0

        def training_step(self, batch):
            self.calls += 1
            part = "student" if self.calls % 2 else "critic"
            yield part, {"x": self.critic(self.student(batch["labelled"]["weak"])).mean()}

    with pytest.raises(ValueError, match="'student' and another 'critic'"):
        fit(Fickle(), streams(), trainer(accumulate=2))


# -- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3])
def test_k_accumulated_batches_equal_one_of_k_times_the_size(k):
    small, big = Classify(plain_net()), Classify(plain_net())
    fit(small, streams(batch_size=4), trainer(steps=4, accumulate=k, optimizer=Optimizer(lr=0.3)))
    fit(big, streams(batch_size=4 * k), trainer(steps=4, optimizer=Optimizer(lr=0.3)))
    for one, two in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_length_of_a_step():
    for max_norm, clipped in ((1e-3, True), (1e3, False)):
        method = Classify(plain_net())
        before = torch.cat([p.detach().flatten() for p in method.parameters()])
        fit(method, streams(), trainer(steps=1, optimizer=Optimizer(lr=1.0, momentum=0), clip_norm=max_norm))
        length = (torch.cat([p.detach().flatten() for p in method.parameters()]) - before).norm().item()
        assert (length == pytest.approx(1e-3, rel=1e-2)) if clipped else 1e-2 < length < 10


def test_loss_weights_factor_their_terms_and_may_follow_a_schedule():
    def run(weight):
        method = Classify(plain_net())
        method.weights = {"ce": 0.0, "size": weight}
        fit(method, streams(), trainer(steps=1, optimizer=Optimizer(lr=1.0, momentum=0)))
        return torch.cat([p.detach().flatten() for p in method.parameters()])

    start = torch.cat([p.detach().flatten() for p in plain_net().parameters()])
    torch.testing.assert_close(run(3.0) - start, 3 * (run(1.0) - start), rtol=1e-3, atol=1e-6)
    assert torch.equal(run(Schedule(start=3.0)), run(3.0))
    assert torch.equal(run(Schedule("linear", warmup=1)), start)  # in its warm-up it begins at zero


def test_bf16_runs_forward_in_bf16_and_views_in_full_precision():
    seen = {}

    class Watch(Classify):
        def training_step(self, batch):
            seen["view"] = batch["labelled"]["weak"].clone()
            seen["logits"] = self.student(batch["labelled"]["weak"]).dtype
            return super().training_step(batch)

    class Shift:
        """A view with a matrix product, as geometry has: bf16 would round its coordinates."""

        def __call__(self, images):
            return images @ torch.eye(8).roll(1, 0) * 0.999

    method = Watch(plain_net())
    fit(method, {"labelled": stream(view=Shift)}, trainer(steps=1, precision="bf16-mixed"))
    assert seen["logits"] == torch.bfloat16
    assert seen["view"].dtype == torch.float32 and not torch.equal(seen["view"], seen["view"].bfloat16().float())


def test_bf16_learns_nearly_what_full_precision_learns():
    results = []
    for precision in ("32-true", "bf16-mixed"):
        method = Classify(norm_net())
        fit(method, streams(), trainer(steps=5, precision=precision))
        results.append(method.student[-1].weight.detach())
    assert 0 < (results[0] - results[1]).abs().max() < 0.02


def test_channels_last_gives_the_same_numbers():
    results = []
    for channels_last in (False, True):
        method = Classify(norm_net())
        fit(method, streams(), trainer(steps=5, channels_last=channels_last))
        assert method.student[0].weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        results.append(weights_of(method))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-4)


COMPILED = {
    "kd": (lambda: KD(norm_net(), Frozen(norm_net(seed=1))), 2),
    "dho": (lambda: DHO(norm_net(), Frozen(norm_net(seed=1))), 4),
    "shrinkmatch": (lambda: ShrinkMatch(norm_net(), threshold=0.3), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_networks_give_the_same_numbers(name):
    make, networks = COMPILED[name]
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        torch.compiler.reset()
        counters.clear()
        method = make()
        fit(method, two_streams(), trainer(steps=3, compile=compile))
        results.append(weights_of(method))
        assert (counters["stats"]["unique_graphs"] >= networks) == compile
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5, equal_nan=True)


# -- moving average, early stop, best epoch --------------------------------------------------------------------


def test_the_moving_average_ships():
    follower, plain = Classify(plain_net()), Classify(plain_net())
    states = []

    class Kept(Classify):
        def after_step(self):
            states.append(weights_of(self.student))

    plain = Kept(plain_net())
    fit(plain, streams(), trainer(steps=5))
    fit(follower, streams(), trainer(steps=5, ema_decay=0.7))
    average = weights_of(plain_net())
    for state in states:
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in state.items()}
    for name, value in average.items():
        torch.testing.assert_close(follower.student.state_dict()[name], value, rtol=1e-4, atol=1e-6)


class Scores:
    """An evaluator that gives out prepared scores, one at each evaluation, and remembers what it was shown."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.shown = iter(scores), []

    def __call__(self, model, samples):
        self.shown.append(weights_of(model))
        return {"accuracy": next(self.scores), "evaluation": float(len(self.shown))}


def run_with(scores: Scores, **settings):
    method = Classify(plain_net())
    result = fit(method, streams(), trainer(**settings), validation=pictures(8), evaluator=scores)
    return method, result


def test_early_stop_ends_after_patience_evaluations_without_a_better_one():
    _, result = run_with(Scores(0.1, 0.5, 0.4, 0.5, 0.9), epochs=5, early_stop=EarlyStop(patience=2))
    assert (len(result.validation), result.steps) == (4, 24)


def test_early_stop_counts_a_gain_below_min_delta_as_none_and_can_watch_a_minimum():
    stop = EarlyStop(patience=1, min_delta=0.1, mode="min")
    _, result = run_with(Scores(1.0, 0.8, 0.75, 0.1), epochs=4, early_stop=stop)
    assert [row["accuracy"] for row in result.validation] == [1.0, 0.8, 0.75]


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_the_best_epoch_ships_with_its_metrics(mode, best):
    scores = Scores(0.3, 0.6, 0.2, 0.6)
    method, result = run_with(scores, epochs=4, select="accuracy", select_mode=mode)
    assert not differing(weights_of(method.student), scores.shown[best])
    assert result.metrics == {"accuracy": [0.3, 0.6, 0.2, 0.6][best], "evaluation": best + 1.0}


def test_a_metric_that_is_nan_at_first_does_not_stay_the_best():
    _, result = run_with(Scores(math.nan, 0.2, 0.1), epochs=3, select="accuracy")
    assert result.metrics["accuracy"] == 0.2


@pytest.mark.parametrize("setting", [{"select": "acuracy"}, {"early_stop": EarlyStop(metric="acuracy")}])
def test_a_metric_that_nobody_measures_is_named(setting):
    with pytest.raises(UserError, match="'acuracy'; the evaluator measures accuracy"):
        run_with(Scores(1, 1), epochs=2, **setting)


def test_watching_a_metric_without_validation_data_is_refused_at_once():
    with pytest.raises(UserError, match="no validation data"):
        fit(Classify(plain_net()), streams(), trainer(select="accuracy"))


# -- epochs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps", "per_epoch", "epochs"),
    [
        ({"epochs": 2}, 12, 6, 2),
        ({"epochs": 2, "accumulate": 2}, 6, 3, 2),
        ({"epochs": 3, "accumulate": 4}, 3, 1, 3),  # what does not fill an optimiser step belongs to the next epoch
        ({"epochs": 2, "accumulate": 9}, 2, 1, 2),
        ({"steps": 4}, 4, 6, 1),
        ({"steps": 13}, 13, 6, 3),
    ],
)
def test_epochs_and_steps(settings, steps, per_epoch, epochs):
    calls = []

    class Count(Classify):
        def after_epoch(self):
            calls.append((self.clock.step, self.clock.epoch))

    method = Count(plain_net())
    result = fit(method, streams(), trainer(**settings))
    assert (result.steps, method.clock.steps_per_epoch, method.clock.epochs) == (steps, per_epoch, epochs)
    ends = [min((e + 1) * per_epoch, steps) for e in range(epochs)]
    assert calls == [(end, end // per_epoch) for end in ends]


def test_the_clock_counts_done_steps_and_epochs():
    clock = Clock(step=11, steps=20, steps_per_epoch=6)
    assert (clock.epoch, clock.epochs) == (1, 4)


@pytest.mark.parametrize(("every", "evaluated"), [(1, [6, 12, 18, 24, 30]), (2, [12, 24, 30]), (9, [30])])
def test_evaluations_come_every_so_many_epochs_and_at_the_end(every, evaluated):
    _, result = run_with(Scores(*[0.5] * 5), epochs=5, evaluate_every=every)
    assert [row["step"] for row in result.validation] == evaluated


def test_tune_sees_the_validation_data_before_each_evaluation_in_eval_mode():
    seen = []

    class Tuned(Classify):
        def tune(self, validation):
            seen.append((self.training, sum(len(fields["image"]) for fields in validation)))

    method = Tuned(plain_net())
    fit(method, streams(), trainer(epochs=2), validation=pictures(8), evaluator=Scores(1, 1))
    assert seen == [(False, 8)] * 2


def test_the_averaged_copy_that_is_tuned_reads_the_clock_of_the_run():
    seen = []

    class Tuned(Classify):
        def tune(self, validation):
            seen.append(self.clock.step)

    method = Tuned(plain_net())
    fit(method, streams(), trainer(epochs=2, ema_decay=0.5), validation=pictures(8), evaluator=Scores(1, 1))
    assert seen == [6, 12]


# -- the door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"epochs": 1, "steps": 1}, {"steps": 0}, {"steps": 1, "clip_norm": 0.0}, {"steps": 1, "ema_decay": 1.5}],
)
def test_impossible_trainers_are_refused(settings):
    with pytest.raises(UserError):
        Trainer(**settings)


def test_devices_launched_in_another_precision_are_refused():
    fabric = trainer().fabric()
    with pytest.raises(UserError, match="bf16-mixed.*32-true"):
        fit(Classify(plain_net()), streams(), trainer(precision="bf16-mixed"), fabric=fabric)


def test_a_missing_stream_and_a_missing_view_are_named():
    with pytest.raises(UserError, match="needs the stream 'labelled'"):
        fit(Classify(plain_net()), {"unlabelled": stream()}, trainer())
    bare = stream()
    del bare.views["weak"]
    with pytest.raises(UserError, match="view 'weak'"):
        fit(Classify(plain_net()), {"labelled": bare}, trainer())


def test_teacher_and_student_of_different_classes_are_refused():
    method = Classify(plain_net())
    method.teacher = Frozen(plain_net(classes=7))
    with pytest.raises(UserError, match="7 classes and the student 4"):
        fit(method, streams(), trainer())


def test_a_label_out_of_the_students_range_is_refused():
    with pytest.raises(UserError, match="label 3, but the student has 3 classes"):
        fit(Classify(plain_net(classes=3)), streams(), trainer())


def test_a_method_without_a_classifier_is_no_matter_of_class_counts():
    class Headless(Method):
        streams = {"labelled": ("weak",)}

        def __init__(self):
            super().__init__()
            self.student = nn.Conv2d(3, 3, 1)
            self.teacher = Frozen(nn.Conv2d(3, 3, 1))

        def training_step(self, batch):
            wanted = self.teacher(batch["labelled"], "weak").logits
            return {"mse": F.mse_loss(self.student(batch["labelled"]["weak"]), wanted)}

    assert fit(Headless(), streams(), trainer()).steps == 6


def test_a_loop_can_be_stepped_by_hand():
    loop = Loop(Classify(plain_net()), streams(view=Noisy), trainer(steps=3))
    before = weights_of(loop.method)
    loop.step()
    assert loop.clock.step == 1 and differing(before, weights_of(loop.method))
