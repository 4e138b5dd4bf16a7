"""Denoisers: preconditioning, parameterisations, the tap on the bottleneck, guidance, errors at the door."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models import class_count, save_model
from limbeck.models.diffusion import (
    BottleneckDiscriminator,
    Denoiser,
    DenoisingMlp,
    DenoisingUNet,
    EDMDenoiser,
    FewStepSampler,
    FlowMatching,
    ImageShape,
    OdeSampler,
    VariancePreserving,
    denoise_guided,
    denoiser_of,
    guide,
    load_denoiser,
    load_sampler,
    require_images,
    weights_fixed,
)


class Knows(nn.Module):
    """Says of any input the same thing, and keeps what it was given."""

    image_shape, num_classes, bottleneck, bottleneck_shape, origin = ImageShape(1, 2, 2), None, "inner", (4, 1), {}

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer, self.inner = answer, nn.Identity()

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        self.given = (x, time)
        return self.inner(self.answer)


def unet(**more) -> DenoisingUNet:
    torch.manual_seed(0)
    net = DenoisingUNet(num_classes=10, channels=(8, 16), **more)
    for parameter in net.parameters():  # so that nothing is zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def mlp(num_classes: int | None = 10) -> DenoisingMlp:
    torch.manual_seed(0)
    net = DenoisingMlp(num_classes=num_classes, width=32, depth=2)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


X, SIGMA, LABEL = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 80.0]), torch.tensor([0, 4, 9])


def test_edm_preconditioning_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    for sigma in (0.002, 0.7, 80.0):
        net = Knows(torch.randn(1, 1, 2, 2))
        x = torch.randn(1, 1, 2, 2)
        found = EDMDenoiser(net, 0.5)(x, torch.tensor([sigma]))
        torch.testing.assert_close(found, scheduler.precondition_outputs(x, net.answer, torch.tensor(sigma)))
        torch.testing.assert_close(net.given[0], scheduler.precondition_inputs(x, torch.tensor(sigma)))
        torch.testing.assert_close(net.given[1], scheduler.precondition_noise(torch.tensor([sigma])))


@pytest.mark.parametrize("schedule", [VariancePreserving(), FlowMatching()])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_a_network_that_knows_the_truth_gives_x0(schedule, prediction):
    time_B = schedule.levels(1000)[torch.tensor([300, 800])]
    x0, noise = torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(2, 1, 2, 2, dtype=torch.float64)
    alpha, sigma = (value(time_B).view(2, 1, 1, 1) for value in (schedule.alpha, schedule.sigma))
    answer = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}[prediction]
    denoiser = Denoiser(Knows(answer), schedule, prediction)
    x_t = alpha * x0 + sigma * noise
    expected = x0 if prediction != "v" else (alpha * x_t - sigma * answer) / (alpha**2 + sigma**2)
    torch.testing.assert_close(denoiser(x_t, time_B), expected)
    torch.testing.assert_close(expected, x0)


def test_eps_networks_are_told_the_index_and_flow_networks_a_thousandth():
    for schedule, time, told in ((VariancePreserving(), 250.0, 250.0), (FlowMatching(), 0.25, 250.0)):
        net = Knows(torch.zeros(1, 1, 2, 2))
        Denoiser(net, schedule, "eps")(torch.zeros(1, 1, 2, 2), torch.tensor([time]))
        assert net.given[1].item() == told


@pytest.mark.parametrize("make", [unet, mlp])
@pytest.mark.parametrize("wrap", [EDMDenoiser, lambda net: Denoiser(net, VariancePreserving(), "eps")])
def test_the_bottleneck_is_the_inner_map_of_the_same_forward(make, wrap):
    denoiser, kept = wrap(make()), {}
    module = denoiser.net.get_submodule(denoiser.net.bottleneck)
    found = denoiser.bottleneck(X, SIGMA, LABEL)
    handle = module.register_forward_hook(lambda m, i, out: kept.update(map=out))
    denoiser(X, SIGMA, LABEL)
    handle.remove()
    channels, side = denoiser.bottleneck_shape
    assert found.shape == (3, channels, side, side)
    assert torch.equal(found.flatten(1), kept["map"].flatten(1))


def test_the_bottleneck_trains_what_stands_before_it_and_nothing_behind():
    denoiser = EDMDenoiser(unet())
    denoiser.bottleneck(X, SIGMA, LABEL).sum().backward()
    assert denoiser.net.first.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in denoiser.net.up.parameters())


@pytest.mark.parametrize("make", [unet, mlp])
def test_class_and_noise_level_change_the_answer_and_no_label_is_the_null_label(make):
    denoiser = EDMDenoiser(make())
    null = torch.full((3,), 10)
    assert not torch.allclose(denoiser(X, SIGMA, LABEL), denoiser(X, SIGMA, null))
    assert torch.equal(denoiser(X, SIGMA), denoiser(X, SIGMA, null))
    one = torch.ones(3)
    assert not torch.allclose(denoiser(X, one, LABEL), denoiser(X, 1.1 * one, LABEL))


def test_both_conventions_of_guidance():
    c, u = torch.tensor([2.0]), torch.tensor([1.0])
    assert guide(c, u, 3.0, "conditional").item() == 5.0
    assert guide(c, u, 3.0, "unconditional").item() == 4.0
    assert guide(c, u, 0.0, "conditional") == c and guide(c, u, 1.0, "unconditional") == c


@pytest.mark.parametrize("base", ["conditional", "unconditional"])
def test_guided_denoising_is_the_guidance_of_both_predictions(base):
    denoiser = EDMDenoiser(mlp())
    conditional, unconditional = denoiser(X, SIGMA, LABEL), denoiser(X, SIGMA)
    found = denoise_guided(denoiser, X, SIGMA, LABEL, 2.0, base)
    torch.testing.assert_close(found, guide(conditional, unconditional, 2.0, base), rtol=1e-4, atol=1e-5)
    off = 0.0 if base == "conditional" else 1.0
    assert torch.equal(denoise_guided(denoiser, X, SIGMA, LABEL, off, base), conditional)


def test_weights_that_are_fixed_get_no_gradient_and_are_free_again_after():
    layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    layer.bias.requires_grad_(False)
    with weights_fixed(layer):
        out = layer(x)
    out.backward()
    assert x.grad is not None and layer.weight.grad is None
    assert layer.weight.requires_grad and not layer.bias.requires_grad


@pytest.mark.parametrize(("side", "halvings"), [(1, 0), (2, 0), (4, 0), (7, None), (8, 1), (32, 3)])
def test_a_discriminator_halves_the_map_to_4x4_and_gives_one_logit(side, halvings):
    if halvings is None:
        with pytest.raises(UserError, match="cannot halve a 7x7 map"):
            BottleneckDiscriminator(8, side)
        return
    head = BottleneckDiscriminator(8, side)
    strided = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    logits = head(torch.randn(3, 8, side, side))
    assert logits.shape == (3,) and len(strided) == halvings
    assert logits.std() > 1e-4, "the logit tells maps apart, also where the normalisation sees a single pixel"


@pytest.mark.parametrize("channels", [768, 1280])
def test_at_the_paper_s_sizes_the_heads_are_the_official_ones(channels):
    with torch.device("meta"):
        head = BottleneckDiscriminator(channels, 8)
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["Conv2d", "GroupNorm", "SiLU"] * 2 + ["Conv2d"]
    assert [layer.num_groups for layer in head.layers if isinstance(layer, nn.GroupNorm)] == [32, 32]
    sizes = [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in head.layers if isinstance(m, nn.Conv2d)]
    assert sizes == [(4, 2, 1), (4, 1, 0), (1, 1, 0)]


def test_pictures_that_a_unet_cannot_halve_are_refused():
    with pytest.raises(UserError, match="14 pixels, which cannot be halved 2 times"):
        DenoisingUNet(image_size=14, channels=(8, 8, 8))


def test_images_and_labels_that_do_not_fit_are_refused():
    denoiser = EDMDenoiser(mlp())
    require_images(denoiser, (1, 8, 8), LABEL)
    for shape, labels, words in (
        ((1, 14, 14), LABEL, "makes images 1x8x8 and the data's are 1x14x14"),
        ((1, 8, 8), None, "10 classes, but the images have no label"),
        ((1, 8, 8), torch.tensor([3, 10]), "the label 10 is outside"),
        ((1, 8, 8), torch.tensor([-1, 1]), "the label -1 is outside"),
    ):
        with pytest.raises(UserError, match=words):
            require_images(denoiser, shape, labels)
    require_images(EDMDenoiser(mlp(None)), (1, 8, 8), None)
    with pytest.raises(UserError, match="no diffusion model"):
        denoiser_of(nn.Linear(1, 1))


def test_diffusion_models_are_no_classifiers():
    denoiser = EDMDenoiser(mlp(None))
    assert class_count(denoiser) is None and class_count(OdeSampler(denoiser)) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "mlp", "config": {"width": 16, "depth": 2}, "sigma_data": 0.7, "schedule": {"sigma_max": 40.0}},
        {"name": "unet", "config": {"channels": [8, 8]}, "prediction": "v", "schedule": {"kind": "cosine"}},
        {"name": "unet", "config": {"channels": [8]}, "prediction": "flow", "conditional": False},
    ],
)
@pytest.mark.parametrize(
    "sampler", [None, FewStepSampler, lambda d: OdeSampler(d, 3, "euler", 1.0 if d.num_classes is None else 1.5)]
)
def test_a_saved_model_loads_again(arguments, sampler, tmp_path):
    denoiser = load_denoiser(**arguments, num_classes=3, in_channels=1, image_size=8)
    model = denoiser if sampler is None else sampler(denoiser)
    save_model(model, tmp_path)
    again = load_sampler(tmp_path)
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    inputs = (noise, torch.tensor([0.5, 0.5]), label) if sampler is None else (noise, label)
    torch.testing.assert_close(again(*inputs), model(*inputs))
    assert type(again) is type(model) and denoiser_of(load_denoiser(tmp_path)).origin == denoiser.origin


def test_names_and_arguments_that_are_not_there_are_refused(tmp_path):
    sizes = {"in_channels": 1, "image_size": 8}
    for arguments, words in (
        ({"name": "unit"}, "no diffusion model 'unit' .did you mean 'unet'"),
        ({"name": "mlp", **sizes, "config": {"widht": 3}}, "no argument 'widht'"),
        ({"name": "mlp", **sizes, "schedule": {"kind": "cosine"}}, "schedule of 'edm' models has no argument 'kind'"),
        ({"name": "mlp", **sizes, "prediction": "eps", "sigma_data": 0.5}, "sigma_data belongs to prediction 'edm'"),
        ({"name": "mlp"}, "give in_channels and image_size"),
    ):
        with pytest.raises(UserError, match=words):
            load_denoiser(**arguments)
    with pytest.raises(UserError, match="no folder of a saved diffusion model"):
        load_sampler(tmp_path)


TINY = {
    "UNet2DModel": {
        "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 4, "layers_per_block": 1,
    },
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "norm_num_groups": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY)
def test_networks_of_diffusers_answer_like_our_own(kind, tmp_path):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    arguments = {"num_classes": 10, "in_channels": 1, "image_size": 8, "config": TINY[kind]}
    denoiser = load_denoiser(f"diffusers-config:{kind}", **arguments).eval()
    out = denoiser(X, SIGMA, LABEL)
    assert out.shape == X.shape and torch.isfinite(out).all() and torch.isfinite(denoiser(X, SIGMA)).all()
    channels, side = denoiser.bottleneck_shape
    features = denoiser.bottleneck(X, SIGMA, LABEL)
    assert features.shape == (3, channels, side, side)
    assert BottleneckDiscriminator(channels, side)(features).shape == (3,)
    save_model(FewStepSampler(denoiser), tmp_path)
    torch.testing.assert_close(load_denoiser(tmp_path).eval()(X, SIGMA, LABEL), out)


def test_a_pipeline_folder_of_diffusers_states_prediction_and_schedule(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(8, 1, 1, num_class_embeds=11, **TINY["UNet2DModel"])
    net.save_pretrained(tmp_path / "unet")
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path / "scheduler")
    denoiser = load_denoiser(f"diffusers:{tmp_path}").eval()
    assert denoiser.prediction == "v" and denoiser.num_classes == 10
    assert denoiser.schedule.settings["kind"] == "cosine"
    time_B = torch.tensor([10, 500, 990])
    v = net.eval()(X, time_B, class_labels=LABEL).sample
    alpha, sigma = (value(time_B).view(3, 1, 1, 1) for value in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    torch.testing.assert_close(denoiser(X, time_B, LABEL).double(), alpha * X - sigma * v, rtol=1e-4, atol=1e-5)


def test_diffusers_networks_that_cannot_be_used_are_refused(tmp_path):
    pytest.importorskip("diffusers")
    sizes = {"in_channels": 1, "num_classes": 10}
    deep = {**TINY["UNet2DModel"], "block_out_channels": [8, 8, 8], "down_block_types": ["DownBlock2D"] * 3}
    for name, arguments, words in (
        ("diffusers-config:UNet3D", {"image_size": 8}, "no 'diffusers-config:UNet3D'"),
        (
            "diffusers-config:UNet2DModel",
            {"image_size": 14, "config": {**deep, "up_block_types": ["UpBlock2D"] * 3}},
            "halves pictures 2 times, which 14 pixels do not allow",
        ),
        (f"diffusers:{tmp_path}", {}, "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=words):
            load_denoiser(name, **sizes, **arguments)


def test_a_copy_has_a_bottleneck_of_its_own():
    denoiser = EDMDenoiser(mlp())
    other = copy.deepcopy(denoiser)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert other.bottleneck(X, SIGMA, LABEL).abs().max() == 0 < denoiser.bottleneck(X, SIGMA, LABEL).abs().max()
