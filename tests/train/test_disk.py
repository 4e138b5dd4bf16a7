"""A disk without room: what was saved stays whole, and one sentence says what to do."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from limbeck.errors import UserError
from limbeck.train import Workspace, fit
from limbeck.train.checkpoint import load_state, load_tensors, save_state, save_tensors
from limbeck.train.logs import Table, read_csv
from tests.train.toys import Classify, differing, norm_net, streams, trainer


def in_a_process_without_room(job, folder: Path, room: int) -> list[str]:
    """What `job(folder)` says in a process that may write files of `room` bytes at most."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_limited, args=(job, folder, room, sender))
    process.start()
    said = receiver.recv()
    process.join()
    return said


def _limited(job, folder, room, sender):
    torch.set_num_threads(1)
    # Python ignores SIGXFSZ: writing on fails with an OSError, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        sender.send(["done", str(job(folder))])
    except Exception as error:
        sender.send([type(error).__name__, str(error)])


def one_sentence_about(said: list[str], file: Path) -> bool:
    name, text = said
    return name == "UserError" and str(file) in text and "make room on the disk" in text and "\n" not in text


@pytest.mark.parametrize("room", [0, 1, 700, 20_000])
def test_an_old_state_outlives_a_save_without_room(room, tmp_path):
    file = tmp_path / "state.pt"
    save_state(file, {"x": torch.arange(3)})
    said = in_a_process_without_room(lambda _: save_state(file, {"x": torch.zeros(100_000)}), tmp_path, room)
    assert one_sentence_about(said, file) and "what was saved there before is kept" in said[1]
    assert torch.equal(load_state(file)["x"], torch.arange(3))
    assert list(tmp_path.iterdir()) == [file]


def test_a_first_save_without_room_leaves_nothing(tmp_path):
    file = tmp_path / "w.safetensors"
    said = in_a_process_without_room(lambda _: save_tensors(file, {"x": torch.zeros(100_000)}), tmp_path, 20_000)
    assert one_sentence_about(said, file) and "nothing was there before" in said[1]
    assert list(tmp_path.iterdir()) == []


def test_a_row_without_room_is_said_in_one_sentence_and_no_torn_row_is_read(tmp_path):
    table = Table(tmp_path / "t.csv")
    table.add({"step": 1, "a": 1.5})
    size = (tmp_path / "t.csv").stat().st_size
    said = in_a_process_without_room(lambda _: table.add({"step": 2, "a": 2.5}), tmp_path, size + 2)
    assert one_sentence_about(said, tmp_path / "t.csv")
    assert read_csv(tmp_path / "t.csv") == [{"step": 1, "a": 1.5}]


def test_a_folder_that_cannot_be_made_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not save .*nothing was there before"):
        save_state(tmp_path / "file" / "state.pt", {})


def test_a_run_goes_on_from_its_last_checkpoint_when_there_is_room_again(tmp_path):
    def whole(folder):
        method = Classify(norm_net(dropout=0.3))
        fit(method, streams(), trainer(checkpoint_every=1, steps=4), folder=folder)
        return method.state_dict()

    def growing(folder):
        """The checkpoint outgrows the room at step 3."""

        class Growing(Classify):
            def after_step(self):
                if self.clock.step == 2:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))

        fit(Growing(norm_net(dropout=0.3)), streams(), trainer(checkpoint_every=1, steps=4), folder=folder)

    said = in_a_process_without_room(growing, tmp_path / "run", resource.RLIM_INFINITY)
    assert one_sentence_about(said, tmp_path / "run" / "checkpoint.pt")
    assert load_state(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert not differing(whole(tmp_path / "whole"), whole(tmp_path / "run"))


def test_a_stage_that_cannot_be_saved_is_not_complete_and_its_training_is_not_lost(tmp_path):
    def run(folder):
        return Workspace(folder, seed=1).fit("student", Classify(norm_net()), streams(), trainer()).state_dict()

    def without_room(folder):
        workspace = Workspace(folder, seed=1)
        complete = workspace._complete
        workspace._complete = lambda *args, **kwargs: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY)),
            complete(*args, **kwargs),
        )
        workspace.fit("student", Classify(norm_net()), streams(), trainer())

    folder = tmp_path / "run"
    said = in_a_process_without_room(without_room, folder, resource.RLIM_INFINITY)
    stage = Workspace(folder).folder("student")
    assert one_sentence_about(said, stage / "done.json")
    assert not Workspace(folder).done("student") and load_state(stage / "checkpoint.pt")["step"] == 6
    assert not differing(run(tmp_path / "whole"), run(folder))
    assert set(load_tensors(stage / "method.safetensors")) == set(run(folder))
