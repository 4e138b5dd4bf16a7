"""EDM: its objective, what it ships, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.data import Samples, Stream
from limbeck.errors import UserError
from limbeck.methods.generation.edm import EDM
from limbeck.models.diffusion import Denoiser, DenoisingMlp, EDMDenoiser, FlowMatching, OdeSampler, VariancePreserving
from limbeck.train import Optimizer, Trainer, fit


def net(num_classes: int | None = 4) -> DenoisingMlp:
    torch.manual_seed(0)
    return DenoisingMlp(image_size=4, num_classes=num_classes, width=16, depth=2)


def pictures(labels: bool = True, top: int = 4) -> Samples:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (32, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Samples({"image": image, **({"label": torch.arange(32) % top} if labels else {})})


def stream(samples: Samples | None = None) -> dict[str, Stream]:
    from limbeck.data import Identity

    return {"images": Stream(samples or pictures(), 16, {"weak": Identity()})}


def test_the_loss_is_the_weighted_error_of_the_preconditioned_network():
    method = EDM(EDMDenoiser(net()))
    images = torch.rand(6, 1, 4, 4)
    torch.manual_seed(3)
    loss = method.training_step({"images": {"weak": images, "label": torch.arange(6) % 4}})["denoising"]
    torch.manual_seed(3)
    sigma = (-1.2 + 1.2 * torch.randn(6, dtype=torch.float64)).exp()
    x, noise = 2 * images - 1, torch.randn(6, 1, 4, 4)
    torch.rand(6)
    predicted = method.student(x + sigma.view(-1, 1, 1, 1).float() * noise, sigma, torch.arange(6) % 4)
    weight = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).view(-1, 1, 1, 1)
    torch.testing.assert_close(loss.double(), (weight * (predicted - x) ** 2).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "student",
    [
        lambda: EDMDenoiser(net()),
        lambda: Denoiser(net(), VariancePreserving(), "eps"),
        lambda: Denoiser(net(), VariancePreserving("cosine"), "v"),
        lambda: Denoiser(net(), FlowMatching(), "flow"),
    ],
)
def test_every_parameterisation_learns_and_ships_a_sampler(student):
    method = EDM(student(), sampling_steps=3, solver="euler")
    trainer = Trainer(steps=60, optimizer=Optimizer("adam", lr=3e-3), accelerator="cpu", log_every=20)
    result = fit(method, stream(), trainer)
    assert result.train[-1]["denoising"] < result.train[0]["denoising"]
    made = method.shipped().sample(3, torch.Generator().manual_seed(0))
    assert isinstance(method.shipped(), OdeSampler) and made.shape == (3, 1, 4, 4)


def test_dropped_labels_become_the_null_label():
    class Reads(EDM):
        pass

    method, label = Reads(EDMDenoiser(net()), label_dropout=0.5), torch.arange(4).repeat(500)
    torch.manual_seed(0)
    dropped = method._label({"label": label}) == 4
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(EDM(EDMDenoiser(net()))._label({"label": label}), label)
    assert EDM(EDMDenoiser(net(None)))._label({"label": label}) is None


def test_images_without_labels_train_a_model_without_classes():
    method = EDM(EDMDenoiser(net(None)))
    result = fit(method, stream(pictures(labels=False)), Trainer(steps=2, accelerator="cpu"))
    assert result.steps == 2


def test_what_does_not_fit_is_refused_before_the_first_step():
    for method, samples, words in (
        (EDM(EDMDenoiser(net(3))), pictures(), "the label 3 is outside of the diffusion model's 3 classes"),
        (EDM(EDMDenoiser(net())), pictures(labels=False), "the images have no label"),
        (EDM(EDMDenoiser(DenoisingMlp(num_classes=4))), pictures(), "makes images 1x8x8 and the data's are 1x4x4"),
    ):
        with pytest.raises(UserError, match=words):
            fit(method, stream(samples), Trainer(steps=1, accelerator="cpu"))
    with pytest.raises(UserError, match="is no diffusion model"):
        EDM(nn.Linear(2, 2))
