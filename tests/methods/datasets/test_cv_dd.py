"""CV-DD's facts: what voters do to pixels and labels, and that the student sees what was labelled."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Data, Samples, Stream
from limbeck.data.replay import Replay, draw_replay
from limbeck.errors import UserError
from limbeck.labels.votes import vote_weights
from limbeck.methods.datasets.cv_dd import LearnReplayed, cv_dd, inversion_loss, recover, relabel, together
from limbeck.models import SmallCnn, load_model
from limbeck.teachers import Ensemble, Frozen
from limbeck.teachers.patches import realistic_patches
from limbeck.train import Optimizer, Stage, Trainer, Workspace

C, SIZE = 3, 8
LABELS = torch.arange(C)
OPTIONS = {"alpha": 0.01, "first_layer": 10.0}


def net(seed: int = 0, channels: tuple[int, ...] = (4, 6)) -> nn.Module:
    torch.manual_seed(seed)
    model = SmallCnn(C, 3, channels)
    model.train()(torch.rand(16, 3, SIZE, SIZE))  # statistics of its own
    return model.eval().requires_grad_(False)


def images(n: int = C) -> Tensor:
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def data(n: int = 60) -> Data:
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(n) % C
    pictures = torch.randint(0, 200, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    pictures[torch.arange(n), label] += 50  # each class has a colour
    samples = Samples({"image": pictures, "label": label})
    return Data(train=samples, test=samples)


def gradient(networks: list[nn.Module], weights: Tensor) -> Tensor:
    x = images().requires_grad_()
    inversion_loss(networks, weights, x, LABELS, **OPTIONS).backward()
    return x.grad


# -- recover


def test_one_voter_is_the_single_network_loss() -> None:
    model, x = net(), images()
    read: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, args: read.append(args[0])) for m in model.modules()
               if isinstance(m, nn.BatchNorm2d)]  # fmt: skip
    logits = model(x)
    for handle in handles:
        handle.remove()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    each = [
        (z.var((0, 2, 3), correction=0) - norm.running_var).norm() + (z.mean((0, 2, 3)) - norm.running_mean).norm()
        for z, norm in zip(read, norms, strict=True)
    ]
    expected = F.cross_entropy(logits, LABELS) + 0.01 * (10 * each[0] + each[1])
    assert torch.allclose(inversion_loss([model], torch.ones(1), x, LABELS, **OPTIONS), expected, atol=1e-6)


def test_identical_voters_pull_like_one() -> None:
    model = net()
    one = gradient([model], torch.ones(1))
    three = gradient([model, copy.deepcopy(model), copy.deepcopy(model)], vote_weights([60, 65, 70], 5))
    assert torch.allclose(one, three, atol=1e-6)


def test_a_cold_vote_is_the_best_network_alone() -> None:
    first, second = net(0), net(1, (5,))
    cold = vote_weights([60, 70], 1e-3)
    assert torch.allclose(gradient([first, second], cold), gradient([second], torch.ones(1)), atol=1e-6)


def recovered(iterations: int = 20, **changes) -> Tensor:
    torch.manual_seed(9)
    start = (images() * 255).to(torch.uint8)
    settings = {"mean_C": torch.full((3,), 0.4), "std_C": torch.full((3,), 0.2), "jitter": 2, **changes}
    return recover([net()], torch.ones(1), start, LABELS, iterations=iterations, **settings)


def test_pixels_stay_in_their_range_and_become_bytes() -> None:
    found = recovered(lr=50.0)  # steps that would leave it by far
    assert found.dtype == torch.uint8
    assert int(found.min()) == 0 and int(found.max()) == 255


def test_pixels_move_towards_their_labels_and_the_statistics_and_networks_stay() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    start = (images() * 255).to(torch.uint8)
    loss = {
        n: float(inversion_loss([model], torch.ones(1), x.float() / 255, LABELS, **OPTIONS))
        for n, x in (("before", start), ("after", recovered(150)))
    }
    assert loss["after"] < loss["before"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


# -- labels


def halves_labelled(statistics: bool, pictures: Tensor) -> Tensor:
    replay = draw_replay(len(pictures), (SIZE, SIZE), epochs=1, batch_size=8, cutmix_alpha=None)
    return relabel(Frozen(net(), batch_statistics=statistics), pictures, replay)[0]


def test_a_label_depends_on_its_batch_mates_with_batch_statistics_only() -> None:
    pictures = (images(8) * 255).to(torch.uint8)
    replay = draw_replay(8, (SIZE, SIZE), epochs=1, batch_size=8, cutmix_alpha=None)
    rows = replay.picture[0]
    changed = pictures.clone()
    changed[rows[1]] = 255 - changed[rows[1]]
    for statistics in (True, False):
        first, second = halves_labelled(statistics, pictures), halves_labelled(statistics, changed)
        same = [bool(torch.equal(a, b)) for a, b in zip(first, second, strict=True)]
        # Row 1 has changed; its mates are the other rows of the first half, and the second half never hears of it.
        assert same == ([False] * 4 + [True] * 4 if statistics else [True, False] + [True] * 6)


def test_labelling_with_batch_statistics_leaves_the_network_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    voice = Frozen(copy.deepcopy(model), batch_statistics=True)
    relabel(voice, (images(8) * 255).to(torch.uint8), draw_replay(8, (SIZE, SIZE), epochs=1, batch_size=8))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_the_teacher_labels_the_mixed_pixels_that_the_student_sees() -> None:
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}

    class Watch(nn.Module):
        def __init__(self, who: str) -> None:
            super().__init__()
            self.who, self.inner = who, nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, C))

        def forward(self, x: Tensor) -> Tensor:
            seen[self.who].append(x.clone())
            return self.inner(x)

    pictures = (images(12) * 255).to(torch.uint8)
    replay = draw_replay(12, (SIZE, SIZE), epochs=2, batch_size=8)  # the second batch of each epoch has 4 rows
    logits = relabel(Frozen(Watch("teacher")), pictures, replay)
    method = LearnReplayed(Watch("student"), pictures, batch_size=8)
    stream = Stream(replay.samples(logits=logits), 1, shuffle=False, view_field="picture")
    stream.open("batches", 0)
    for step in range(len(replay)):
        method.clock.step = step
        method.training_step({"batches": stream.next()})
    assert replay.cut.any() and logits.dtype == torch.float16
    assert torch.equal(torch.cat(seen["teacher"]), torch.cat(seen["student"]))


def test_the_students_loss_is_the_mean_divergence_of_two_halves_without_t_squared() -> None:
    pictures = (images(8) * 255).to(torch.uint8)
    replay = draw_replay(8, (SIZE, SIZE), epochs=1, batch_size=8)
    logits = relabel(Frozen(net(1)), pictures, replay)
    student = net(2)
    method = LearnReplayed(student, pictures, temperature=20.0, batch_size=8)
    fields = replay.samples(logits=logits).batch(torch.arange(1))
    x = next(replay.batches(pictures))
    p, q = (logits[0].float() / 20).softmax(-1), (student(x) / 20).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(method.training_step({"batches": fields})["kl"], expected, atol=1e-6)


def test_labels_are_the_weighted_sum_of_the_voters_logits() -> None:
    pictures = (images(8) * 255).to(torch.uint8)
    replay = draw_replay(8, (SIZE, SIZE), epochs=1, batch_size=8)
    models, weights = [net(0), net(1)], vote_weights([60, 70], 10)
    found = relabel(Ensemble([Frozen(m) for m in models], weights=weights.tolist()), pictures, replay)
    x = next(replay.batches(pictures))
    expected = sum(w * m(x) for w, m in zip(weights, models, strict=True))
    assert torch.allclose(found[0].float(), expected, atol=2e-3)


# -- starts


def test_patches_are_crops_that_the_teacher_finds_realistic() -> None:
    def mean_score(difficulty: str) -> float:
        torch.manual_seed(0)
        made = realistic_patches(Frozen(net()), data().train, per_class=2, difficulty=difficulty)
        assert made.shape == (C, 2, 3, SIZE, SIZE) and made.dtype == torch.uint8
        logits = net()(made.flatten(0, 1).float() / 255)
        return float(F.cross_entropy(logits, torch.arange(C).repeat_interleave(2)))

    assert mean_score("easy") < mean_score("medium")


def test_stitched_patches_fill_one_picture() -> None:
    made = realistic_patches(Frozen(net()), data().train, per_class=2, factor=2)
    assert made.shape == (C, 2, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="class 0 has 20 pictures, 24 are wanted"):
        realistic_patches(Frozen(net()), data().train, per_class=6, factor=2)


# -- the system


def run(path: Path, **settings) -> tuple[nn.Module, Workspace]:
    torch.manual_seed(1)
    ws = Workspace(path)
    stage = Stage(Trainer(epochs=1, optimizer=Optimizer("adamw", 1e-3), accelerator="cpu"))
    options = {"ipc": 4, "iterations": 3, "epochs": 2, "batch_size": 12, "priors": (60.0, 65.0), **settings}
    return cv_dd(ws, data(), SmallCnn(C, 3, (5,)), net(0), net(1, (5, 5)), validate=stage, **options), ws


def test_the_system_ships_a_student_of_the_synthetic_set_and_says_what_that_takes(tmp_path: Path) -> None:
    shipped, ws = run(tmp_path)
    stored = ws.measured
    assert stored["stored.picture_bytes"] == 4 * C * 3 * SIZE * SIZE
    assert stored["stored.label_bytes"] == 2 * 4 * C * C * 2
    assert stored["stored.real_bytes"] == 60 * 3 * SIZE * SIZE
    again, _ = run(tmp_path)
    assert torch.equal(shipped(images()), again(images()))


def test_without_priors_they_are_measured_for_each_network_alone(tmp_path: Path) -> None:
    _, ws = run(tmp_path, priors=None)
    assert {"prior-0.score.percent", "prior-1.score.percent"} <= ws.measured.keys()
    assert (tmp_path / "stages" / "prior-1.recover").is_dir()


def test_members_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"members are \[2\], and there are 2 networks"):
        run(tmp_path / "a", members=(2,))
    with pytest.raises(UserError, match="there are 1 priors for 2 networks"):
        run(tmp_path / "b", priors=(60.0,))


def share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    made = [torch.full((C, 1, 2, 2), index, dtype=torch.uint8) for index in range(rank, 3, 2)]
    torch.save(together(made, 3, torch.zeros(C, 3, 1, 2, 2, dtype=torch.uint8)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_indices_and_hold_all_pictures_in_order(tmp_path: Path) -> None:
    mp.spawn(share, args=(str(tmp_path),), nprocs=2)
    made = [torch.full((C, 1, 2, 2), index, dtype=torch.uint8) for index in range(3)]
    alone = together(made, 3, torch.zeros(C, 3, 1, 2, 2, dtype=torch.uint8))
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone)
    assert alone[:, 0, 0, 0].tolist() == [0] * C + [1] * C + [2] * C


@pytest.mark.slow
def test_a_committee_of_real_resnets_takes_one_step_on_224_pixels() -> None:
    common = {"num_classes": 10, "in_channels": 3}
    basic = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    networks = [load_model("hf-config:resnet", config=config, **common).eval() for config in (basic, {})]
    start = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    pixel = {"mean_C": torch.full((3,), 0.45), "std_C": torch.full((3,), 0.22)}
    made = recover(networks, vote_weights([56.4, 42.3], 5), start, torch.arange(2), iterations=1, jitter=32, **pixel)
    assert made.shape == start.shape and not torch.equal(made, start)
    replay = Replay(**draw_replay(4, (224, 224), epochs=1, batch_size=4).columns())
    voice = Frozen(networks[0], batch_statistics=True)
    assert bool(relabel(voice, torch.cat([made, start]), replay).isfinite().all())
