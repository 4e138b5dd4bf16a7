"""MAE as a method: what it paints and what it ships."""

from __future__ import annotations

import pytest
import torch

from limbeck import UserError
from limbeck.methods.representation.mae import MAE
from tests.models.test_mae import network


def test_the_loss_is_that_of_transformers_with_the_same_noise():
    net, image = network(), torch.rand(4, 1, 8, 8)
    method = MAE(net).eval()
    torch.manual_seed(5)
    noise = torch.rand(4, 16)
    torch.manual_seed(5)
    loss = method.training_step({"unlabelled": {"weak": image}})["reconstruction"]
    torch.testing.assert_close(loss, net.model(image, noise=noise).loss)


def test_normalised_patches_are_transformers_norm_pix_loss():
    net, image = network(config={"norm_pix_loss": True}), torch.rand(4, 1, 8, 8)
    method = MAE(net, normalize_patches=True).eval()
    torch.manual_seed(5)
    noise = torch.rand(4, 16)
    torch.manual_seed(5)
    loss = method.training_step({"unlabelled": {"weak": image}})["reconstruction"]
    torch.testing.assert_close(loss, net.model(image, noise=noise).loss)


def test_every_step_draws_another_mask():
    method, image = MAE(network()).eval(), torch.rand(4, 1, 8, 8)
    first, second = (method.training_step({"unlabelled": {"weak": image}})["reconstruction"] for _ in range(2))
    assert first != second


def test_what_ships_gives_embeddings():
    assert MAE(network()).shipped()(torch.rand(3, 1, 8, 8)).shape == (3, 8)


def test_a_network_that_is_no_masked_autoencoder_is_refused():
    with pytest.raises(UserError, match="no masked autoencoder"):
        MAE(torch.nn.Linear(3, 3))
