"""Two gloo processes learn what one learns from batches of twice the size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from limbeck.distributed import rank, world_size
from limbeck.methods.classification.kd import KD
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.classification.supervised import Supervised
from limbeck.methods.few_labels.dho import DHO
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.methods.few_labels.simclrv2 import SimCLR
from limbeck.models import Projector, convert_sync_batchnorm
from limbeck.teachers import Frozen
from limbeck.train import Method, NonFiniteLoss, Optimizer, Schedule, Trainer, Workspace, average_gradients, fit
from limbeck.train.loop import RunningTerms
from tests.train.toys import CLASSES, Noisy, differing, norm_net, streams, two_streams


def confident_net() -> torch.nn.Module:
    """With sure and unsure answers, so that no term of ShrinkMatch is zero."""
    net = norm_net(seed=3)
    net[-1].weight.data.mul_(10)
    return net


METHODS = {
    "kd": lambda: KD(norm_net(), Frozen(norm_net(seed=1))),
    "dho": lambda: DHO(norm_net(), Frozen(norm_net(seed=1))),
    "dho_joint": lambda: DHO(norm_net(), Frozen(norm_net(seed=1)), joint_forward=True),
    "shrinkmatch": lambda: ShrinkMatch(confident_net(), threshold=0.6),
    "shrinkmatch_aligned": lambda: ShrinkMatch(confident_net(), threshold=0.6, align=True),
    "ps_kd": lambda: PSKD(norm_net()),
    "simclr": lambda: SimCLR(norm_net(), Projector(CLASSES, hidden=6, out=5), temperature=2.0),
}


def share(whole: Tensor) -> Tensor:
    """This process's rows of a global batch."""
    return whole.chunk(world_size())[rank()]


def batch() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)

    def images(n: int) -> Tensor:
        return torch.rand(n, 3, 8, 8, generator=generator)

    labelled = {"weak": images(8), "label": torch.arange(8) % CLASSES, "index": torch.arange(8)}
    unlabelled = {"weak": images(16), "strong": images(16), "index": torch.arange(16)}
    unlabelled |= {"first": unlabelled["weak"], "second": unlabelled["strong"]}
    return {
        name: {field: share(value) for field, value in fields.items()}
        for name, fields in (("labelled", labelled), ("unlabelled", unlabelled))
    }


def one_step(name: str) -> dict[str, Tensor]:
    """Averaged gradients, buffers and loss terms of one step without an update."""
    torch.manual_seed(0)
    method: Method = METHODS[name]()
    method.prepare(streams())
    convert_sync_batchnorm(method)
    method.train()
    losses = method.training_step(batch())
    sum(method.now(method.weights.get(term, 1.0)) * value for term, value in losses.items()).backward()
    average_gradients(method.parameters())
    terms = {}
    for term, value in losses.items():
        mean = value.detach().clone()
        if world_size() > 1:
            dist.all_reduce(mean)
            mean /= world_size()
        terms[f"loss/{term}"] = mean
    gradients = {f"gradient/{n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
    return {**terms, **gradients, **{f"buffer/{n}": b.clone() for n, b in method.named_buffers()}}


def settings(**more: object) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
        epochs=2,
        optimizer=Optimizer(lr=0.05, momentum=0.9),
        schedule=Schedule("cosine"),
        log_every=1,
        **more,
    )


FITS = {
    "supervised": (lambda: Supervised(norm_net(seed=rank())), lambda n, view: streams(n, view)),
    "shrinkmatch": (lambda: ShrinkMatch(confident_net(), threshold=0.6), lambda n, view: two_streams(n, view)),
}


def whole_fit(name: str, fabric=None, folder=None, kind=None, **more: object) -> dict[str, Tensor]:
    """A fit with the global batch of 6 over the processes, and the losses that it logged."""
    make, make_streams = FITS[name]
    method = make()
    if kind is not None:
        method.__class__ = kind
    views = {"view": Noisy} if folder else {"view": type(streams()["labelled"].views["weak"])}
    result = fit(method, make_streams(6 // world_size(), **views), settings(**more), fabric=fabric, folder=folder)
    rows = {
        f"row/{r['step']}": torch.tensor([v for k, v in r.items() if k != "samples_per_second"]) for r in result.train
    }
    return {**method.state_dict(), **rows}


class Broken(Exception):
    pass


class Breaking(ShrinkMatch):
    def after_step(self) -> None:
        super().after_step()
        if self.clock.step == 3:
            raise Broken


def broken_and_resumed(folder: Path, fabric) -> dict[str, dict[str, Tensor]]:
    arguments = {"fabric": fabric, "checkpoint_every": 2, "ema_decay": 0.9}
    whole = whole_fit("shrinkmatch", folder=folder / "whole", **arguments)
    with pytest.raises(Broken):
        whole_fit("shrinkmatch", folder=folder / "broken", kind=Breaking, **arguments)
    return {"whole": whole, "resumed": whole_fit("shrinkmatch", folder=folder / "broken", **arguments)}


def two_stages(folder: Path, fabric) -> dict[str, Tensor]:
    """Run twice: the second time both stages are loaded."""
    found = {}
    for time in ("run", "loaded"):
        workspace = Workspace(folder, {"who": "both"}, fabric=fabric)
        method = workspace.fit("first", Supervised(norm_net()), streams(3), settings())
        noise = workspace.compute("second", lambda: {"x": torch.rand(3)})
        found |= {f"{time}/{name}": value for name, value in {**method.state_dict(), **noise}.items()}
    return found


def bad_loss_on_one() -> str:
    terms = RunningTerms(check_each_step=False, checkpoint=None)
    terms.take({"ce": torch.tensor(1.0), "kd": torch.tensor(float("nan") if rank() else 1.0)}, 7)
    try:
        terms.look()
    except NonFiniteLoss as error:
        return str(error)
    return "nothing"


def both(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "NODE_RANK": "0"}
    fabric = Trainer(steps=1, accelerator="cpu", devices=2, strategy="ddp").fabric()
    place = Path(folder)
    try:
        assert (rank(), world_size()) == (number, 2)
        found = {
            "steps": {name: one_step(name) for name in METHODS},
            "fits": {name: whole_fit(name, fabric) for name in FITS},
            "draw": torch.rand(()),
            "resume": broken_and_resumed(place / "resume", fabric),
            "stages": two_stages(place / "stages", fabric),
            "bad": bad_loss_on_one(),
        }
        torch.save(found, place / f"{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes found; they start once, for starting is what takes the time."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(both, (str(folder), port), nprocs=2)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_gradients_of_one_with_the_double_batch(name, found):
    alone = one_step(name)
    assert all(value.abs().max() > 0 for key, value in alone.items() if key.startswith("loss/"))
    for process in found:
        assert list(process["steps"][name]) == list(alone)
        for key, value in alone.items():
            theirs = process["steps"][name][key]
            torch.testing.assert_close(theirs, value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_the_table_of_past_predictions_is_the_same_in_both_processes(found):
    tables = [process["steps"]["ps_kd"]["buffer/past.table"] for process in found]
    assert torch.equal(*tables)
    assert ((tables[0] > 0) & (tables[0] < 1)).all(-1).sum() == 8  # the whole global batch was written, and no more


@pytest.mark.parametrize("name", FITS)
def test_a_fit_in_two_processes_equals_one_with_the_double_batch(name, found):
    """`supervised` starts from other weights in the second process: the first one's count."""
    alone = whole_fit(name)
    for process in found:
        assert list(process["fits"][name]) == list(alone)
        for key, value in alone.items():
            torch.testing.assert_close(process["fits"][name][key], value, rtol=1e-3, atol=1e-4)


def test_both_processes_end_with_the_same_weights(found):
    assert not differing(found[0]["fits"]["shrinkmatch"], found[1]["fits"]["shrinkmatch"])


def test_a_run_in_two_processes_goes_on_bit_for_bit(found):
    for process in found:
        assert not differing(process["resume"]["whole"], process["resume"]["resumed"])


def test_processes_draw_their_own_noise(found):
    assert not torch.equal(*(process["draw"] for process in found))


def test_stages_load_in_both_processes_what_they_left(found):
    for process in found:
        for name, value in process["stages"].items():
            if name.startswith("run/"):
                assert torch.equal(value, process["stages"][name.replace("run/", "loaded/")])
    assert torch.equal(found[0]["stages"]["run/x"], found[1]["stages"]["run/x"])


def test_a_bad_loss_in_one_process_stops_both(found):
    for process in found:
        assert "'kd' is not finite at step 7" in process["bad"]


def test_a_checkpoint_of_two_processes_is_refused_by_one(tmp_path):
    fit(Supervised(norm_net()), streams(), settings(), folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, "ranks": state["ranks"] * 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="saved by 2 processes and this run has 1"):
        fit(Supervised(norm_net()), streams(), settings(), folder=tmp_path)
