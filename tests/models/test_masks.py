"""Masks on features: the formula, and that what is masked replaces the feature and leaves nothing behind.

Letters: B samples, D width of a feature.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models import SmallCnn, class_count
from limbeck.models.masks import Masked, MaskNet, apply_mask, mask_for, masked


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, feature: Tensor) -> Tensor:
        return torch.full_like(feature, self.value)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def looped_mask(mask: MaskNet, feature_D: Tensor) -> Tensor:
    """The paper's formula for one sample, attention head by head."""
    width = len(feature_D)
    tokens = (mask.embed.weight @ feature_D + mask.embed.bias).reshape(width, -1)
    attention, heads = mask.attention, mask.attention.num_heads
    q, k, v = (tokens @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
    size = tokens.shape[1] // heads
    parts = []
    for h in range(heads):
        of = slice(h * size, (h + 1) * size)
        parts.append((q[:, of] @ k[:, of].T / size**0.5).softmax(1) @ v[:, of])
    attended = attention.out_proj(torch.cat(parts, 1))
    return mask.score(attended)[:, 0].sigmoid()


def test_the_mask_is_the_papers_formula():
    torch.manual_seed(0)
    mask, feature = MaskNet(13), torch.randn(5, 13)
    assert mask.attention.embed_dim == 6  # 13 // (2 * 3) * 3
    torch.testing.assert_close(mask(feature), torch.stack([looped_mask(mask, f) for f in feature]))


@pytest.mark.parametrize(
    ("shape", "kind", "mask_shape"),
    [((2, 9), "vector", (2, 9)), ((2, 9, 5, 4), "map", (2, 9, 1, 1)), ((2, 7, 9), "tokens", (2, 1, 9))],
)
def test_masks_fit_the_feature_and_lie_between_0_and_1(shape, kind, mask_shape):
    torch.manual_seed(0)
    feature = torch.randn(shape)
    mask = mask_for(feature)
    assert mask.kind == kind
    value = mask(feature)
    assert value.shape == mask_shape and value.min() > 0 and value.max() < 1
    torch.testing.assert_close(apply_mask(mask, feature), value * feature)


def test_a_map_of_one_position_is_a_vector():
    feature = torch.randn(2, 9, 1, 1)
    mask = mask_for(feature)
    assert mask.kind == "vector"
    assert torch.equal(apply_mask(mask, feature)[:, :, 0, 0], mask(feature[:, :, 0, 0]) * feature[:, :, 0, 0])


def test_a_low_rank_embedding_has_few_weights_and_a_narrow_feature_is_refused():
    full, low = (sum(p.numel() for p in MaskNet(60, rank=rank).embed.parameters()) for rank in (None, 4))
    assert full == 60 * 60 * 30 + 60 * 30 and low < full / 8
    with pytest.raises(UserError, match="at least 6 entries, got 5"):
        MaskNet(5)
    with pytest.raises(UserError, match="is \\[B,D\\]"):
        mask_for(torch.zeros(2))


def test_a_mask_of_ones_gives_the_plain_teachers_logits():
    model, x = net(), torch.randn(5, 4)
    assert torch.equal(Masked(model, "1", Constant(1.0))(x), model(x))


def test_the_masked_feature_replaces_the_feature():
    model, x = net(), torch.randn(5, 4)
    mask = mask_for(torch.zeros(1, 8))
    hidden = model[1](model[0](x))
    torch.testing.assert_close(Masked(model, "1", mask)(x), model[2](mask(hidden) * hidden))


def test_of_a_tuple_the_first_entry_is_masked():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    model, x = Pair(), torch.randn(2, 5, 4)
    torch.testing.assert_close(Masked(model, "inner", Constant(0.25))(x), 0.25 * model(x))


def test_nothing_is_left_behind_even_after_an_error():
    model, x = net(), torch.randn(5, 4)
    plain = model(x)
    names = set(vars(model))
    with pytest.raises(RuntimeError), masked(model, "1", Constant(0.0)):
        model(torch.randn(5, 99))
    assert torch.equal(model(x), plain) and set(vars(model)) == names
    assert not model[1]._forward_hooks


def test_two_masks_at_once_are_refused():
    model = net()
    with masked(model, "1", Constant(0.5)), pytest.raises(UserError, match="'1' of this model is masked already"):
        Masked(model, "0", Constant(0.5))(torch.randn(5, 4))


def test_another_threads_forward_is_not_masked():
    model, x, found = net(), torch.randn(5, 4), []
    plain = model(x)
    with masked(model, "1", Constant(0.0)):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)


def test_an_unknown_layer_is_named_with_the_nearest():
    with pytest.raises(UserError, match="no module 'stages.7'; the nearest name is 'stages"):
        Masked(SmallCnn(3, 1, (8, 8)), "stages.7", Constant(1.0))


def test_the_classifier_is_still_found_behind_the_mask():
    assert class_count(Masked(SmallCnn(3, 1, (8, 8)), "stages.1", mask_for(torch.zeros(1, 8, 4, 4)))) == 3


def test_gradient_reaches_the_mask_through_a_frozen_teacher():
    model, mask = net().requires_grad_(False), mask_for(torch.zeros(1, 8))
    Masked(model, "1", mask)(torch.randn(5, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in mask.named_parameters() if "bias" not in n)
    assert all(p.grad is None for p in model.parameters())
