"""Runs that are killed: each of them in a process of its own, forked from one that has imported everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from limbeck.data import Data
from limbeck.methods.classification.ps_kd import PSKD
from limbeck.methods.classification.supervised import Supervised
from limbeck.methods.few_labels.dho import DHO
from limbeck.methods.few_labels.shrinkmatch import ShrinkMatch
from limbeck.methods.few_labels.simclrv2 import simclrv2
from limbeck.teachers import Frozen
from limbeck.train import Method, Optimizer, Schedule, Stage, StreamSettings, Trainer, Workspace
from tests.train.toys import Noisy, norm_net, pictures, stream, streams, trainer, two_streams


def settings(**more: object) -> Trainer:
    return trainer(
        steps=12,
        optimizer=Optimizer(lr=0.05, momentum=0.9),
        schedule=Schedule("cosine", warmup=2),
        checkpoint_every=3,
        log_every=2,
        **more,
    )


def net() -> torch.nn.Module:
    """Dropout, BatchNorm, and weights that are drawn from where the generator stands."""
    return norm_net(seed=int(torch.randint(2**31, ())), dropout=0.3)


def one_stage_one_stream(ws: Workspace) -> Method:
    return ws.fit("student", PSKD(net()), streams(view=Noisy), settings(ema_decay=0.9))


def one_stage_two_streams(ws: Workspace) -> Method:
    return ws.fit("student", ShrinkMatch(net(), threshold=0.3, align=True), two_streams(view=Noisy), settings())


def many_stages_one_stream(ws: Workspace) -> Method:
    ws.fit("teacher", Supervised(net()), streams(view=Noisy), settings())
    noise = ws.compute("noise", lambda: {"scale": torch.rand(()) + 0.5})
    student = PSKD(net(), alpha_final=float(noise["scale"]) / 2)
    return ws.fit("student", student, streams(view=Noisy), settings(ema_decay=0.9, accumulate=2))


def many_stages_two_streams(ws: Workspace) -> Method:
    teacher = ws.fit("teacher", Supervised(net()), streams(view=Noisy), settings(ema_decay=0.9))
    labelled = ws.label("labels", Frozen(teacher.student), pictures(12))
    given = two_streams(view=Noisy)
    # The labels are compared bit for bit by way of the student that learns from their argmax.
    given["labelled"] = stream(labelled.with_fields({"label": labelled.fields["logits"].argmax(-1)}), 4, Noisy)
    return ws.fit("student", DHO(net(), Frozen(teacher.student)), given, settings())


def three_stages_of_simclrv2(ws: Workspace) -> torch.nn.Module:
    data = Data(pictures(16), pictures(8), unlabelled=pictures(24, seed=1, labelled=False))

    def stage(stream: str, *views: str) -> Stage:
        return Stage(settings(), {stream: StreamSettings(8, dict.fromkeys(views, "weak"))})

    return simclrv2(
        ws,
        data,
        net(),
        net(),
        pretrain=stage("unlabelled", "first", "second"),
        finetune=stage("labelled", "weak"),
        distill=stage("unlabelled", "weak"),
    )


RUNS: dict[str, Callable[[Workspace], torch.nn.Module]] = {
    run.__name__: run
    for run in (
        one_stage_one_stream,
        one_stage_two_streams,
        many_stages_one_stream,
        many_stages_two_streams,
        three_stages_of_simclrv2,
    )
}


def run(name: str, folder: str) -> None:
    """Go through a run, or on with it, and leave what it ends with in `final.pt`."""
    torch.set_num_threads(1)
    workspace = Workspace(Path(folder), {"run": name}, seed=3)
    Path(folder, "started").touch()
    method = RUNS[name](workspace)
    rows = {
        f"row/{stage}/{i}/{column}": torch.tensor(value, dtype=torch.float64)
        for stage, fitted in workspace.fits.items()
        for i, row in enumerate(fitted.train)
        for column, value in row.items()
        if column != "samples_per_second"
    }
    stored = Path(folder, "stages", "labels", "tensors.safetensors")
    labels = {"labels": torch.frombuffer(bytearray(stored.read_bytes()), dtype=torch.uint8)} if stored.exists() else {}
    # How the generator stands tells whether all draws were made, and none twice.
    state = {**method.state_dict(), **rows, **labels, "next draw": torch.rand(())}
    torch.save(state, Path(folder, "final.part"))
    Path(folder, "final.part").rename(Path(folder, "final.pt"))
