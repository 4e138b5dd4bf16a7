"""Stages that are done are loaded, and what they leave is the same as if they had just run."""

from __future__ import annotations

import pytest
import torch

from limbeck.errors import UserError
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.models import Outputs
from limbeck.teachers import Frozen
from limbeck.train import Optimizer, Workspace
from tests.train.toys import Classify, Noisy, differing, norm_net, pictures, plain_net, streams, trainer


class Never(Classify):
    def training_step(self, batch):
        raise AssertionError("this stage is done")


def test_a_done_stage_loads_without_a_step_of_training(tmp_path):
    first = Workspace(tmp_path).fit("student", Classify(norm_net()), streams(), trainer())
    workspace = Workspace(tmp_path)
    again = workspace.fit("student", Never(norm_net(seed=1)), streams(), trainer())
    assert not differing(first.state_dict(), again.state_dict())
    assert not again.training and workspace.done("student")
    assert workspace.fits["student"].steps == again.clock.step == 6


def test_a_done_stage_keeps_its_metrics_and_rows(tmp_path):
    def run():
        workspace = Workspace(tmp_path, evaluator=lambda model, samples: {"accuracy": 1 / 3})
        workspace.fit("student", Classify(norm_net()), streams(), trainer(log_every=2), validation=pictures(8))
        return workspace.fits["student"]

    first, again = run(), run()
    assert first == again and first.metrics == {"accuracy": 1 / 3} and len(first.train) == 3


def test_a_done_stage_with_tables_that_depend_on_the_data_loads(tmp_path):
    first = Workspace(tmp_path).fit("student", PSKD(norm_net()), streams(), trainer())
    again = Workspace(tmp_path).fit("student", PSKD(norm_net(seed=1)), streams(), trainer())
    assert torch.equal(first.past.table, again.past.table)


def test_a_done_stage_keeps_no_checkpoint(tmp_path):
    Workspace(tmp_path).fit("student", Classify(norm_net()), streams(), trainer(checkpoint_every=1))
    files = {path.name for path in Workspace(tmp_path).folder("student").iterdir()}
    assert files == {"done.json", "method.safetensors", "train.csv"}


@pytest.mark.parametrize("teacher_too", [False, True])
def test_a_loaded_network_answers_as_the_trained_one_to_the_last_bit(tmp_path, teacher_too):
    """Convolutions round differently in another memory format: a loaded stage takes on the same one."""

    def run():
        workspace = Workspace(tmp_path, seed=2)
        method = Classify(norm_net())
        if teacher_too:
            method.teacher = Frozen(norm_net(seed=5))
        workspace.fit("first", method, streams(), trainer())
        asked = method.teacher.model if teacher_too else method.student
        assert asked[0].weight.is_contiguous(memory_format=torch.channels_last)
        return asked(pictures(8).fields["image"] / 255)

    assert torch.equal(run(), run())


def test_draws_between_stages_are_the_same_whether_a_stage_ran_or_was_loaded(tmp_path):
    def run():
        workspace = Workspace(tmp_path, seed=4)
        draws = [torch.rand(())]
        workspace.fit("first", Classify(norm_net(dropout=0.5)), streams(view=Noisy), trainer())
        draws.append(torch.rand(()))
        draws.append(workspace.compute("second", lambda: {"x": torch.rand(3)})["x"])
        draws.append(torch.rand(()))
        labels = workspace.label("third", Frozen(plain_net()), pictures())
        return [*draws, labels.fields["logits"], torch.rand(())]

    first, again = run(), run()
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    seeds = [Workspace(tmp_path / str(seed), seed=seed) and torch.rand(()) for seed in (1, 2)]
    assert seeds[0] != seeds[1]


def test_computed_tensors_are_made_once(tmp_path):
    calls = []
    for _ in range(2):
        made = Workspace(tmp_path).compute("codes", lambda: calls.append(1) or {"x": torch.arange(3)})
        assert torch.equal(made["x"], torch.arange(3))
    assert len(calls) == 1


def test_labels_are_the_teachers_outputs_for_every_sample_in_order(tmp_path):
    teacher, samples = Frozen(plain_net()), pictures(10)
    labelled = Workspace(tmp_path).label("labels", teacher, samples, batch_size=4)
    wanted = plain_net()(samples.fields["image"] / 255)
    torch.testing.assert_close(labelled.fields["logits"], wanted.detach())
    assert not labelled.fields["logits"].requires_grad and torch.equal(labelled.index, samples.index)


def test_any_function_may_label_and_builds_no_graph(tmp_path):
    model, seen = plain_net(), []

    def ask(fields, view):
        seen.append(torch.is_grad_enabled())
        return Outputs(logits=model(fields[view]))

    Workspace(tmp_path).label("labels", ask, pictures(4))
    assert seen == [False]


def test_a_workspace_of_another_recipe_is_refused_and_the_first_difference_named(tmp_path):
    Workspace(tmp_path, {"method": {"name": "kd", "alpha": 0.5}, "seed": 0})
    Workspace(tmp_path, {"seed": 0, "method": {"alpha": 0.5, "name": "kd"}})  # the order says nothing
    for config, words in [
        ({"method": {"name": "kd", "alpha": 0.9}, "seed": 0}, r"method\.alpha is 0\.5, here 0\.9"),
        ({"method": {"name": "kd", "alpha": 0.5}}, r"seed is 0, here None"),
        ({"method": {"name": "kd", "alpha": 0.5}, "seed": 0, "extra": 1}, r"extra is None, here 1"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            Workspace(tmp_path, config)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_stage_of_another_architecture_is_refused_in_one_sentence(tmp_path):
    Workspace(tmp_path).fit("student", Classify(norm_net()), streams(), trainer())
    with pytest.raises(UserError, match=r"method\.safetensors belongs to another architecture") as error:
        Workspace(tmp_path).fit("student", Classify(plain_net()), streams(), trainer())
    assert "\n" not in str(error.value)


def test_a_damaged_stage_is_refused_in_one_sentence(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.fit("student", Classify(norm_net()), streams(), trainer())
    file = workspace.folder("student") / "method.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"method\.safetensors is damaged") as error:
        Workspace(tmp_path).fit("student", Classify(norm_net()), streams(), trainer())
    assert "\n" not in str(error.value)


def test_stages_do_not_share_random_numbers(tmp_path):
    """Two stages of the same method and seed see different noise."""
    weights = []
    for stage in ("one", "two"):
        method = Classify(plain_net())
        Workspace(tmp_path).fit(stage, method, streams(view=Noisy), trainer(optimizer=Optimizer(lr=1.0)))
        weights.append(method.state_dict())
    assert differing(*weights)
