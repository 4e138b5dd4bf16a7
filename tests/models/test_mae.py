"""Patches, masks and the masked autoencoder over transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.errors import UserError
from limbeck.losses import masked_patch_mse
from limbeck.models import (
    kept_patches,
    load_masked_autoencoder,
    patch_targets,
    patchify,
    random_masking,
    save_model,
    sin_cos_positions,
    unpatchify,
)

TINY = {
    "patch_size": 2,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 8,
}


def network(seed: int = 0, **more):
    torch.manual_seed(seed)
    config = {**TINY, **more.pop("config", {})}
    return load_masked_autoencoder("hf-config:vit_mae", config=config, in_channels=1, image_size=8, **more).eval()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_unpatchify_undoes_patchify(batch, channels, rows, columns, size):
    image = torch.rand(batch, channels, rows * size, columns * size)
    patches = patchify(image, size)
    assert patches.shape == (batch, rows * columns, size * size * channels)
    assert torch.equal(unpatchify(patches, size, rows * size, columns * size), image)


def test_patches_are_ordered_row_column_channel_as_transformers_orders_them():
    net = network()
    image = torch.rand(2, 1, 8, 8)
    assert torch.equal(patchify(image, 2), net.model.patchify(image))
    colour = torch.arange(2 * 2 * 3.0).view(1, 3, 2, 2)
    assert patchify(colour, 2)[0, 0].tolist() == colour[0].permute(1, 2, 0).flatten().tolist()


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 49), (0.95, 9), (0.98, 3), (0.0, 196), (1.0, 1)])
def test_the_number_of_visible_patches_is_rounded_down(ratio, kept):
    assert kept_patches(196, ratio) == kept


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_a_mask_keeps_the_patches_of_least_noise_and_restores_their_places(seed, kept):
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed))
    keep, restore, mask = random_masking(noise, kept)
    assert (mask.sum(1) == 12 - kept).all()
    for row in range(3):
        assert set(keep[row].tolist()) == set(noise[row].argsort()[:kept].tolist())
        assert (mask[row, keep[row]] == 0).all()
        shuffled = torch.cat([keep[row], noise[row].argsort()[kept:]])
        assert shuffled[restore[row]].tolist() == list(range(12))


def test_with_the_same_noise_transformers_paints_the_same():
    net, image, noise = network(), torch.rand(3, 1, 8, 8), torch.rand(3, 16)
    keep, restore, mask = random_masking(noise, kept_patches(16, net.model.config.mask_ratio))
    painted = net.decode(net.latent(net.blocks(image, keep)[-1]), restore)
    theirs = net.model(image, noise=noise)
    torch.testing.assert_close(painted, theirs.logits)
    assert torch.equal(mask, theirs.mask)
    torch.testing.assert_close(masked_patch_mse(painted, net.to_patches(image), mask), theirs.loss)


def test_positions_are_those_that_pretrained_checkpoints_have():
    net = network(config={"hidden_size": 16, "num_attention_heads": 2})
    ours = net.model.vit.embeddings.position_embeddings.clone()
    net.model.vit.embeddings.initialize_weights()  # transformers' own, in the checkpoints' layout
    torch.testing.assert_close(ours, net.model.vit.embeddings.position_embeddings.detach())
    assert torch.equal(ours, sin_cos_positions(16, 4)) and not ours.requires_grad


def test_neighbouring_columns_differ_in_the_first_half_and_rows_in_the_second():
    first, right, below = sin_cos_positions(8, 3)[0, [1, 2, 4]]
    assert torch.equal(first[4:], right[4:]) and not torch.equal(first[:4], right[:4])
    assert torch.equal(first[:4], below[:4]) and not torch.equal(first[4:], below[4:])


def test_black_pictures_have_finite_gradients():
    net = network()
    net(torch.zeros(2, 1, 8, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_blocks_behind_the_last_one_are_never_run():
    net, calls = network(), []
    for number, block in enumerate(net.model.vit.layers):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    assert len(net.blocks(torch.rand(2, 1, 8, 8), last=1)) == 2
    assert calls == [0, 1]


def test_the_loss_ignores_visible_patches():
    torch.manual_seed(0)
    painted, target = torch.rand(2, 6, 4), torch.rand(2, 6, 4)
    mask = torch.tensor([[1.0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    changed = target + 5 * (1 - mask[:, :, None])
    assert torch.equal(masked_patch_mse(painted, target, mask), masked_patch_mse(painted, changed, mask))
    by_hand = torch.stack([(painted - target)[b, p].square().mean() for b, p in mask.nonzero().tolist()]).mean()
    torch.testing.assert_close(masked_patch_mse(painted, target, mask), by_hand)


def test_without_a_masked_patch_the_loss_is_zero_and_finite():
    assert masked_patch_mse(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.zeros(2, 3)) == 0


def test_normalised_targets_have_mean_zero_and_unbiased_variance_one():
    target = patch_targets(torch.rand(2, 5, 12) * 7 + 3, normalize=True)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_a_flat_patch_has_finite_targets():
    assert patch_targets(torch.full((1, 1, 4), 0.3), normalize=True).abs().max() == 0


def test_embeddings_are_the_mean_of_the_patches_or_the_class_token():
    image = torch.rand(2, 1, 8, 8)
    net, cls = network(), network(pooling="cls")
    tokens = net.latent(net.blocks(image)[-1])
    torch.testing.assert_close(net(image), tokens[:, 1:].mean(1))
    torch.testing.assert_close(cls(image), tokens[:, 0])


def test_the_imagenet_normalisation_is_the_networks_own():
    net = load_masked_autoencoder("hf-config:vit_mae", config=TINY, in_channels=3, image_size=8, normalize="imagenet")
    image = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(net.to_patches(image), torch.zeros(1, 16, 12), atol=1e-6, rtol=0)


def test_a_saved_one_loads_again(tmp_path):
    net = network()
    save_model(net, tmp_path)
    again = load_masked_autoencoder(f"hf:{tmp_path}").eval()
    image = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(again(image), net(image))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "vit"}, "no masked autoencoder 'vit'"),
        (
            {"name": "hf-config:vit_mae", "config": {"patch_size": 3}, "image_size": 8},
            "cannot be cut into patches of 3",
        ),
        ({"name": "hf-config:vit_mae", "config": {"hiden_size": 3}}, "hidden_size"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, named):
    with pytest.raises(UserError, match=named):
        load_masked_autoencoder(**arguments)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(UserError, match="built for pictures of 8x8, got 10x10"):
        network()(torch.rand(1, 1, 10, 10))
