"""A run that breaks off at any step, in this process, and goes on from its last checkpoint."""

from __future__ import annotations

import pytest
import torch

from limbeck.errors import UserError
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.train import EarlyStop, Optimizer, Schedule, Trainer, fit
from tests.train.toys import Classify, Noisy, differing, norm_net, pictures, plain_net, streams, trainer, two_streams

STEPS = 9


class Broken(Exception):
    """What stands for a crash."""


def breaking(kind: type, at: int) -> type:
    class Breaking(kind):
        def after_step(self):
            super().after_step()
            if self.clock.step == at:
                raise Broken

    return Breaking


SYSTEMS = {
    "ps_kd": (PSKD, lambda: {}, lambda: streams(view=Noisy)),
    "shrinkmatch": (ShrinkMatch, lambda: {"threshold": 0.3, "align": True}, lambda: two_streams(view=Noisy)),
}


def settings(**more: object) -> Trainer:
    # Batches of 4 of 24 (PS-KD) are 6 steps an epoch, so 9 steps end in mid-epoch; ShrinkMatch has 3 an epoch.
    return trainer(
        steps=STEPS, optimizer=Optimizer(lr=0.05), schedule=Schedule("cosine", warmup=2), log_every=2, **more
    )


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_break_at_any_step_changes_no_bit(system, every, tmp_path):
    kind, arguments, make_streams = SYSTEMS[system]
    trainer = settings(checkpoint_every=every, ema_decay=0.8, accumulate=2 if system == "ps_kd" else 1)

    def go(cls, folder):
        method = cls(norm_net(dropout=0.3), **arguments())
        result = fit(method, make_streams(), trainer, folder=folder)
        rows = [{k: v for k, v in row.items() if k != "samples_per_second"} for row in result.train]
        return method.state_dict(), rows, torch.rand(())

    whole, rows, draw = go(kind, tmp_path / "whole")
    for at in range(STEPS):
        with pytest.raises(Broken):
            go(breaking(kind, at), tmp_path / str(at))
        resumed, its_rows, its_draw = go(kind, tmp_path / str(at))
        assert not differing(whole, resumed)
        assert (its_rows, its_draw) == (rows, draw)


def scored(model, samples):
    """Something that moves with the weights; with more than seven digits that tell epochs apart."""
    return {"accuracy": 0.5 + 1e-9 * float(model[-1].bias.detach().sum())}


@pytest.mark.parametrize("extra", [{"select": "accuracy"}, {"early_stop": EarlyStop(patience=2)}])
def test_best_epoch_and_early_stop_survive_a_break(extra, tmp_path):
    def go(cls, folder):
        method = cls(plain_net())
        trainer = settings(checkpoint_every=1, **extra)
        small = streams(batch_size=12)  # two steps an epoch
        result = fit(method, small, trainer, validation=pictures(8), evaluator=scored, folder=folder)
        return method.state_dict(), result.metrics, result.steps, result.validation

    whole = go(Classify, tmp_path / "whole")
    for at in range(whole[2]):
        with pytest.raises(Broken):
            go(breaking(Classify, at), tmp_path / str(at))
        resumed = go(Classify, tmp_path / str(at))
        assert not differing(whole[0], resumed[0])
        assert resumed[1:] == whole[1:]


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    def go():
        method = Classify(plain_net())
        trainer = settings(early_stop=EarlyStop(patience=1), checkpoint_every=1)
        evaluator = lambda model, samples: {"accuracy": 0.5}  # noqa: E731
        kwargs = {"validation": pictures(8), "evaluator": evaluator, "folder": tmp_path}
        return fit(method, streams(batch_size=12), trainer, **kwargs), method.state_dict()

    first, weights = go()
    assert first.steps == 4
    again, same = go()
    assert again.steps == 4 and not differing(weights, same)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, second = Classify(plain_net()), Classify(plain_net(seed=1))
    result = fit(first, streams(), trainer(steps=3), folder=tmp_path)
    assert fit(second, streams(), trainer(steps=3), folder=tmp_path).train == result.train
    assert not differing(first.state_dict(), second.state_dict())


def test_a_break_before_the_first_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Broken):
        fit(breaking(Classify, 4)(plain_net()), streams(), settings(checkpoint_every=100), folder=tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    resumed, whole = Classify(plain_net()), Classify(plain_net())
    fit(resumed, streams(), settings(), folder=tmp_path)
    fit(whole, streams(), settings())
    assert not differing(whole.state_dict(), resumed.state_dict())


def broken_off(folder) -> None:
    with pytest.raises(Broken):
        fit(breaking(Classify, 4)(plain_net()), streams(), settings(checkpoint_every=2), folder=folder)


def one_sentence(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_checkpoint_of_another_architecture_is_refused_in_one_sentence(tmp_path):
    broken_off(tmp_path)
    for other in (Classify(norm_net()), PSKD(plain_net())):
        with pytest.raises(UserError, match=r"checkpoint\.pt belongs to another architecture") as error:
            fit(other, streams(), settings(), folder=tmp_path)
        assert one_sentence(error)


def test_a_checkpoint_of_another_batch_size_is_refused(tmp_path):
    broken_off(tmp_path)
    with pytest.raises(UserError, match="batch_size=4"):
        fit(Classify(plain_net()), streams(batch_size=3), settings(), folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", None, "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused_in_one_sentence(content, tmp_path):
    broken_off(tmp_path)
    file = tmp_path / "checkpoint.pt"
    if content == "foreign":
        torch.save({"weight": torch.zeros(3)}, file)
    else:
        file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(UserError, match=r"checkpoint\.pt is (damaged or )?no checkpoint") as error:
        fit(Classify(plain_net()), streams(), settings(), folder=tmp_path)
    assert one_sentence(error) and "weights_only" not in str(error.value)


def test_what_a_killed_process_left_of_a_save_is_removed(tmp_path):
    left = tmp_path / ".checkpoint.pt.12345"
    left.write_bytes(b"half of it")
    fit(Classify(plain_net()), streams(), trainer(steps=1), folder=tmp_path)
    assert not left.exists()
