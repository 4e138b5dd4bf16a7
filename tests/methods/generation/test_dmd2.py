"""DMD2: the identities of its equations, who is updated when, backward simulation, and two processes."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import limbeck
from limbeck.data import Identity, Samples, Stream
from limbeck.distributed import rank, world_size
from limbeck.errors import UserError
from limbeck.methods.generation.dmd2 import DMD2, Draws, Level
from limbeck.models import save_model
from limbeck.models.diffusion import (
    Denoiser,
    DenoisingMlp,
    DenoisingUNet,
    EDMDenoiser,
    FewStepSampler,
    OdeSampler,
    VariancePreserving,
    load_denoiser,
)
from limbeck.teachers import Ensemble, Frozen
from limbeck.train import Optimizer, Trainer, average_gradients, fit

FOUR = (999, 749, 499, 249)


def denoiser(seed: int = 0, num_classes: int | None = 4, wrap: type = EDMDenoiser) -> Denoiser:
    torch.manual_seed(seed)
    net = DenoisingMlp(image_size=4, num_classes=num_classes, width=16, depth=2)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return wrap(net)


def eps_model(net: nn.Module) -> Denoiser:
    return Denoiser(net, VariancePreserving(), "eps")


def method(student: int = 0, teacher: int = 0, wrap=EDMDenoiser, **more) -> DMD2:
    made = DMD2(denoiser(student, wrap=wrap), Frozen(denoiser(teacher, wrap=wrap)), **more)
    torch.manual_seed(5)
    return made


def pictures(count: int = 32, top: int = 4) -> Samples:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Samples({"image": image, "label": torch.arange(count) % top})


def stream(samples: Samples | None = None, batch_size: int = 8) -> dict[str, Stream]:
    return {"images": Stream(samples or pictures(), batch_size, {"weak": Identity()})}


def batch(count: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"images": {"weak": torch.rand(count, 1, 4, 4, generator=generator), "label": torch.arange(count) % 4}}


def generated(made: DMD2, count: int = 6) -> tuple[Tensor, Draws]:
    draws = made.draw(torch.zeros(count, 1, 4, 4))
    return made.generate(draws), draws


@pytest.mark.parametrize("wrap", [EDMDenoiser, eps_model])
def test_equal_scores_give_the_generator_no_gradient(wrap):
    """(a): the fake score starts as a copy of the teacher."""
    made = method(student=1, wrap=wrap, gan=False)
    x, draws = generated(made)
    losses = made.generator_losses(x, draws)
    losses["distribution_matching"].backward()
    assert losses["distribution_matching"].item() == 0
    assert all(weight.grad.abs().max() == 0 for weight in made.student.parameters() if weight.grad is not None)


def test_the_generator_s_gradient_is_g_and_reaches_no_score_network():
    """(b)."""
    made = method(student=1, gan=False)
    nudge(made.fake)
    x, draws = generated(made)
    leaf = x.detach().requires_grad_()
    made.generator_losses(leaf, draws)["distribution_matching"].backward()
    x_t, time_B = made._noisy(x.detach(), draws.matching)
    real, fake = made.teacher.model(x_t, time_B, draws.label_B), made.fake(x_t, time_B, draws.label_B)
    g = (fake - real) / (leaf - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(leaf.grad, (g / g.numel()).detach(), rtol=1e-3, atol=1e-6)
    assert all(weight.grad is None for net in (made.teacher.model, made.fake) for weight in net.parameters())


def nudge(net: nn.Module) -> None:
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn_like(weight)


def test_the_generator_turn_leaves_the_guidance_without_gradients():
    """(f): its GAN term passes through fake score and head, which stand still."""
    made = method()
    x, draws = generated(made)
    losses = made.generator_losses(x, draws)
    sum(losses.values()).backward()
    assert losses["realism"].item() > 0
    assert all(weight.grad is None for weight in made.parts()["guidance"])
    assert any(weight.grad.abs().max() > 0 for weight in made.parts()["generator"] if weight.grad is not None)
    assert all(weight.requires_grad for weight in made.parts()["guidance"]), "free again"


def test_the_guidance_turn_leaves_the_generator_without_gradients():
    made = method()
    turns = made.training_step(batch())
    assert next(turns)[0] == "generator"
    part, losses = next(turns)
    sum(losses.values()).backward()
    assert part == "guidance" and all(weight.grad is None for weight in made.student.parameters())
    trunk = made.fake.net.blocks[0].inner.weight.grad
    assert trunk.abs().max() > 0 and all(weight.grad is not None for weight in made.discriminator.parameters())


def test_both_guidance_losses_train_the_trunk_that_they_share():
    made = method()
    x, draws = generated(made)
    losses = made.guidance_losses(x.detach(), torch.rand(6, 1, 4, 4), torch.arange(6) % 4, draws)
    weight = made.fake.net.blocks[0].inner.weight
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert gradient.abs().max() > 0
    behind = made.fake.net.last[1].weight
    assert torch.autograd.grad(losses["discrimination"], behind, allow_unused=True)[0] is None


def test_the_generator_steps_every_r_th_time_and_the_guidance_every_time():
    """(e): in 10 steps with r = 5 twice and 10 times."""
    made = method(ratio=5)
    counted = {"generator": 0, "guidance": 0}

    class Counting(DMD2):
        def training_step(self, batch):
            for part, losses in super().training_step(batch):
                counted[part] += 1
                yield part, losses

    made.__class__ = Counting
    fit(made, stream(), Trainer(steps=10, optimizer=Optimizer("adamw", lr=1e-3), accelerator="cpu"))
    assert counted == {"generator": 2, "guidance": 10}


def test_between_its_turns_the_generator_stands_still_while_the_guidance_moves():
    made = method(ratio=5)
    seen = []

    class Watching(DMD2):
        def after_step(self):
            seen.append((self.student.net.first.weight.clone(), self.fake.net.first.weight.clone()))

    made.__class__ = Watching
    fit(made, stream(), Trainer(steps=6, optimizer=Optimizer("adamw", lr=1e-3), accelerator="cpu"))
    moved = [not torch.equal(*pair) for pair in zip([s for s, _ in seen], [s for s, _ in seen][1:], strict=False)]
    assert moved == [False, False, False, False, True]
    assert all(not torch.equal(a, b) for a, b in zip([f for _, f in seen], [f for _, f in seen][1:], strict=False))


def test_levels_of_matching_are_the_middle_and_those_of_the_fake_score_all():
    made = method()
    draws = made.draw(torch.zeros(40_000, 1, 1, 1))
    assert (int(draws.matching.position_B.min()), int(draws.matching.position_B.max())) == (20, 980)
    for level in (draws.fake, draws.realism, draws.critic_fake, draws.critic_real):
        assert (int(level.position_B.min()), int(level.position_B.max())) == (0, 999)
    assert not torch.equal(draws.critic_fake.position_B, draws.critic_real.position_B)


@pytest.mark.parametrize("wrap", [EDMDenoiser, eps_model])
def test_backward_simulation_of_the_first_level_feeds_exact_noise(wrap):
    """(g), s = 0: no earlier call."""
    made, calls = method(wrap=wrap, levels=FOUR), []
    record(made, calls)
    draws = made.draw(torch.zeros(3, 1, 4, 4))._replace(noises=[torch.randn(3, 1, 4, 4)])
    made.generate(draws)
    scale = 80 if wrap is EDMDenoiser else 1
    assert len(calls) == 1 and torch.equal(calls[0][0], scale * draws.noises[0])


def test_only_the_last_call_of_backward_simulation_owns_a_graph():
    """(g), s = 3."""
    made, calls = method(levels=FOUR), []
    record(made, calls)
    noises = [torch.randn(3, 1, 4, 4) for _ in FOUR]
    x = made.generate(made.draw(torch.zeros(3, 1, 4, 4))._replace(noises=noises))
    assert [graph for _, _, graph in calls] == [False, False, False, True] and x.requires_grad
    times = made.student.schedule.levels(1000)[torch.tensor(FOUR)]
    assert [time for _, time, _ in calls] == times.tolist()


def record(made: DMD2, calls: list) -> None:
    def hook(module, inputs, output):
        calls.append((inputs[0].clone(), float(inputs[1][0]), output.requires_grad))

    made.student.register_forward_hook(hook)


def test_backward_simulation_is_what_ships():
    made = method(levels=FOUR)
    noises = [torch.randn(3, 1, 4, 4) for _ in FOUR]
    draws = made.draw(torch.zeros(3, 1, 4, 4))._replace(noises=noises)
    torch.manual_seed(9)
    noise = torch.randn(3, 1, 4, 4)
    fresh = [torch.randn(3, 1, 4, 4) for _ in FOUR[1:]]
    x = made.generate(draws._replace(noises=[noise, *fresh]))
    torch.manual_seed(9)
    assert torch.equal(torch.randn(3, 1, 4, 4), noise)
    shipped = made.shipped()
    assert isinstance(shipped, FewStepSampler)
    torch.testing.assert_close(shipped(noise, draws.label_B), ((x + 1) / 2).clamp(0, 1))


def test_the_number_of_simulated_levels_varies_with_the_step_and_the_seed_alone():
    made, found = method(levels=FOUR), []
    for step in range(200):
        made.clock.step = step
        torch.manual_seed(step)  # the process's own random state has no part in it
        found.append(made._steps())
    assert set(found) == {1, 2, 3, 4}
    made.seed = 1
    assert found != [made._steps() for made.clock.step in range(200)]


def test_guidance_changes_what_the_teacher_says_and_never_the_fake_score():
    """Guided differently, equal networks are no longer at rest."""
    made, calls = method(gan=False, teacher_guidance=3.0), []
    made.fake.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    x, draws = generated(made)
    assert made.generator_losses(x, draws)["distribution_matching"].item() > 0
    assert calls == [6]


def test_without_gan_no_discriminator_is_built():
    made = method(gan=False)
    parts = list(made.training_step(batch()))
    assert made.discriminator is None and made.weights == {}
    assert [list(losses) for _, losses in parts] == [["distribution_matching"], ["denoising"]]


def test_a_model_without_classes_needs_no_labels():
    made = DMD2(denoiser(num_classes=None), Frozen(denoiser(num_classes=None)))
    samples = pictures().without("label")
    assert fit(made, stream(samples), Trainer(steps=3, accelerator="cpu")).steps == 3


def test_student_and_teacher_may_be_one_network_or_samplers_around_it():
    same = OdeSampler(denoiser())
    made = DMD2(same, Frozen(same))
    before = same.denoiser.net.first.weight.clone()
    fit(made, stream(), Trainer(steps=2, optimizer=Optimizer("adamw", lr=0.1), accelerator="cpu"))
    assert torch.equal(same.denoiser.net.first.weight, before) and not same.training
    assert not torch.equal(made.student.net.first.weight, before)


def test_what_does_not_fit_is_refused_in_one_sentence():
    for make, words in (
        (lambda: DMD2(nn.Linear(1, 1), Frozen(denoiser())), "Linear is no diffusion model"),
        (lambda: DMD2(denoiser(), Ensemble([Frozen(denoiser())])), "give a live one, not a Ensemble"),
        (lambda: DMD2(denoiser(num_classes=3), Frozen(denoiser())), "number of classes is 3 and the teacher's 4"),
        (lambda: DMD2(denoiser(wrap=eps_model), Frozen(denoiser())), "noise schedule is VariancePreserving"),
        (lambda: method(ratio=0), "ratio is 0"),
        (lambda: method(matched=(0.9, 0.1)), "two rising shares"),
        (lambda: method(levels=(500,)), "they fall from 999"),
        (lambda: fit(method(), stream(pictures(top=5)), Trainer(steps=1)), "the label 4 is outside"),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_a_unet_s_bottleneck_serves_the_discriminator():
    torch.manual_seed(0)
    net = EDMDenoiser(DenoisingUNet(image_size=8, num_classes=4, channels=(8, 8)))
    made = DMD2(net, Frozen(EDMDenoiser(DenoisingUNet(image_size=8, num_classes=4, channels=(8, 8)))))
    images = {"images": {"weak": torch.rand(4, 1, 8, 8), "label": torch.arange(4)}}
    for _, losses in made.training_step(images):
        assert all(torch.isfinite(loss) for loss in losses.values())


def test_a_step_reads_nothing_back_from_the_device():
    made = method(levels=FOUR).to("meta")
    made.teacher.to(torch.device("meta"))
    image = torch.empty(4, 1, 4, 4, device="meta")
    label = torch.empty(4, dtype=torch.long, device="meta")
    for part, losses in made.training_step({"images": {"weak": image, "label": label}}):
        sum(losses.values()).backward(inputs=made.parts()[part])
        assert not made.logged.keys() & losses.keys()


def test_a_run_that_was_broken_off_goes_on_bit_for_bit(tmp_path):
    class Broken(Exception):
        pass

    class Breaking(DMD2):
        def after_step(self):
            if self.clock.step == 7:
                raise Broken

    trainer = Trainer(steps=12, optimizer=Optimizer("adamw", lr=1e-3), accelerator="cpu", checkpoint_every=5)
    whole, broken = method(levels=FOUR, ratio=2), method(levels=FOUR, ratio=2)
    fit(whole, stream(batch_size=2), trainer, folder=tmp_path / "whole")
    broken.__class__ = Breaking
    with pytest.raises(Broken):
        fit(broken, stream(batch_size=2), trainer, folder=tmp_path / "broken")
    resumed = method(levels=FOUR, ratio=2)
    fit(resumed, stream(batch_size=2), trainer, folder=tmp_path / "broken")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# -- two processes ----------------------------------------------------------------------------------------------------


def share(whole: Tensor) -> Tensor:
    return whole.chunk(world_size())[rank()]


class Shared(DMD2):
    """Draws for the whole global batch, and takes this process's rows of them."""

    def draw(self, real: Tensor) -> Draws:
        torch.manual_seed(self.clock.step)
        whole = super().draw(torch.zeros(8, *real.shape[1:]))
        levels = {
            name: Level(*map(share, value)) for name, value in whole._asdict().items() if isinstance(value, Level)
        }
        return Draws([share(noise) for noise in whole.noises], share(whole.label_B), **levels)


def one_step() -> dict[str, Tensor]:
    """The averaged gradients of both parts, each of its own turn."""
    made = method(student=1, levels=FOUR)
    nudge_alike(made)
    made.__class__ = Shared
    images = {name: share(value) for name, value in batch(8)["images"].items()}
    found = {}
    for part, losses in made.training_step({"images": images}):
        weights = made.parts()[part]
        for weight in weights:
            weight.grad = None
        sum(losses.values()).backward(inputs=weights)
        average_gradients(weights)
        found |= {f"{part}/{n}": weight.grad for n, weight in enumerate(weights) if weight.grad is not None}
    return found


def nudge_alike(made: DMD2) -> None:
    torch.manual_seed(4)
    nudge(made.fake)


def whole_fit(fabric=None) -> dict[str, Tensor]:
    made = method(student=1, levels=FOUR, ratio=2)
    made.__class__ = Shared
    trainer = Trainer(
        steps=6,
        optimizer=Optimizer("sgd", lr=0.01, momentum=0.0),
        accelerator="cpu",
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
    )
    fit(made, stream(batch_size=8 // world_size()), trainer, fabric=fabric)
    return made.state_dict()


def both(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "NODE_RANK": "0"}
    fabric = Trainer(steps=1, accelerator="cpu", devices=2, strategy="ddp").fabric()
    try:
        own = method(levels=FOUR)
        torch.manual_seed(number)
        steps = torch.tensor([own._steps() for own.clock.step in range(50)])
        found = {"step": one_step(), "fit": whole_fit(fabric), "steps": steps}
        torch.save(found, Path(folder) / f"{number}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_learns_from_the_double_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(both, (str(tmp_path), port), nprocs=2)
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1)]
    assert torch.equal(found[0]["steps"], found[1]["steps"]), "all simulate the same number of levels"
    alone, trained = one_step(), whole_fit()
    assert len(alone) > 20 and any(name.startswith("generator/") for name in alone)
    for process in found:
        assert list(process["step"]) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(process["step"][name], value, rtol=1e-4, atol=1e-6)
        for name, value in trained.items():
            torch.testing.assert_close(process["fit"][name], value, rtol=1e-3, atol=1e-4)


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_step_of_a_unet_of_real_size_from_the_recipe(tmp_path):
    pytest.importorskip("diffusers")
    config = {
        "block_out_channels": [64, 128, 256, 768],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    }
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": 32}
    save_model(load_denoiser("diffusers-config:UNet2DModel", **sizes, config=config), tmp_path / "teacher")
    recipe = {
        "method": "dmd2",
        "data": {"name_or_path": "digits", "image_size": 32, "limit": {"train": 20, "test": 5}},
        "student": {"name": str(tmp_path / "teacher")},
        "teacher": {"name": str(tmp_path / "teacher")},
        "streams": {"images": {"batch_size": 1}},
        "trainer": {"steps": 1, "optimizer": {"name": "adamw", "lr": 2e-6}},
    }
    result = limbeck.run(recipe, workspace=tmp_path / "run", report=False)
    assert sum(weight.numel() for weight in result.method.student.parameters()) > 80e6
    assert result.fit.steps == 1
