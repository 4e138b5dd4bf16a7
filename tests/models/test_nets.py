"""Reference nets: sizes from the papers, shapes, initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.errors import UserError
from limbeck.models import NETS, CifarResNet, Mlp, SmallCnn, SmallViT, count_parameters
from limbeck.models.nets import BasicBlock


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_cifar_resnets_have_the_sizes_of_the_paper(name, millions):
    """He et al. 2016, table 6."""
    assert count_parameters(NETS[name]()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_resnet_keys_are_the_published_ones():
    keys = set(NETS["resnet20"]().state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{k}" for k in norm}
    for layer in (1, 2, 3):
        for block in (0, 1, 2):
            for i in (1, 2):
                expected |= {f"layer{layer}.{block}.conv{i}.weight"}
                expected |= {f"layer{layer}.{block}.bn{i}.{k}" for k in norm}
    assert keys == expected


def test_shortcut_subsamples_and_pads_zero_channels_on_both_sides():
    x = torch.randn(2, 16, 8, 8)
    shortcut = BasicBlock(16, 32, stride=2)._shortcut(x)
    assert shortcut.shape == (2, 32, 4, 4)
    torch.testing.assert_close(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert shortcut[:, :8].abs().sum() == 0 and shortcut[:, 24:].abs().sum() == 0


def test_convolutions_have_kaiming_variance():
    weight = CifarResNet(20).layer3[1].conv1.weight
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.05)


@pytest.mark.parametrize("name", ["resnet20", "small_cnn", "small_vit", "mlp"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_every_net_takes_grey_and_colour_pictures(name, channels, size):
    sized = {"image_size": size} if name in ("small_vit", "mlp") else {}
    model = NETS[name](num_classes=7, in_channels=channels, **sized)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet20", "small_cnn", "small_vit", "mlp"])
def test_every_parameter_of_a_net_gets_a_gradient(name):
    torch.manual_seed(0)
    model = NETS[name]()
    F.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_vit_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    attention = SmallViT(width=12, heads=3).blocks[0].attention
    x = torch.randn(2, 5, 12)
    q, k, v = attention.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attention(x), attention.out(fused))


def test_mlp_takes_rows_of_a_table():
    assert Mlp(num_classes=2, in_channels=16, image_size=1)(torch.rand(5, 16)).shape == (5, 2)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CifarResNet(21), "6n\\+2"),
        (lambda: SmallViT(image_size=30), "patch_size"),
        (lambda: SmallViT(width=97), "heads"),
        (lambda: SmallCnn(channels=()), "channels"),
        (lambda: SmallViT(image_size=32)(torch.rand(1, 3, 16, 16)), "32x32, got 16x16"),
    ],
)
def test_impossible_nets_are_refused_in_one_sentence(build, words):
    with pytest.raises(UserError, match=words):
        build()


def test_mlp_drops_out_in_training_alone():
    net = Mlp(2, in_channels=4, image_size=1, hidden=(50,), dropout=0.5)
    rows = torch.rand(3, 4)
    assert not torch.equal(net.train()(rows), net(rows))
    assert torch.equal(net.eval()(rows), net(rows))
