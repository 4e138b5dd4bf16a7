import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.data import Mix, cutmix, from_mask, mixup, mixup_or_cutmix, permutation

DRAWS = {"seed": st.integers(0, 99), "rows": st.integers(2, 12), "per_sample": st.booleans()}
FRACTION = st.sampled_from([0.0, 0.3, 1.0])


def soft_labels(rows, classes=5):
    return torch.rand(rows, classes).softmax(1)


@settings(max_examples=25, deadline=None)
@given(**DRAWS, fraction=FRACTION, box=st.booleans())
def test_mixed_labels_stay_distributions_and_a_fixed_number_of_rows_mixes(seed, rows, per_sample, fraction, box):
    torch.manual_seed(seed)
    settings = {"per_sample": per_sample, "mix_fraction": fraction}
    mix = cutmix(rows, (8, 6), 1.0, **settings) if box else mixup(rows, 0.8, **settings)
    labels = mix.labels(soft_labels(rows))
    assert (labels >= 0).all() and torch.allclose(labels.sum(1), torch.ones(rows))
    assert int((mix.share < 1).sum()) <= round(fraction * rows)
    if not box:
        assert int((mix.share < 1).sum()) == round(fraction * rows)
    if not per_sample:
        assert len(mix.share[mix.share < 1].unique()) <= 1


@settings(max_examples=25, deadline=None)
@given(**DRAWS)
def test_the_share_of_cutmix_is_the_true_share_of_own_pixels(seed, rows, per_sample):
    torch.manual_seed(seed)
    mix = cutmix(rows, (9, 7), per_sample=per_sample, mix_fraction=0.7, partner=permutation(rows, derange=True))
    images = torch.arange(rows).float().view(rows, 1, 1, 1).expand(rows, 2, 9, 7)
    mixed = mix.pixels(images)
    own = (mixed == images).float().mean((1, 2, 3))
    assert torch.allclose(own, mix.share, atol=1e-6)
    foreign = images[mix.partner]
    assert ((mixed == images) | (mixed == foreign)).all()
    maps = images[:, 0].long()
    assert torch.equal(mix.pixels(maps), mixed[:, 0].long())


def test_cutmix_covers_the_area_that_beta_draws():
    torch.manual_seed(0)
    mix = cutmix(4000, (64, 64), 1.0, per_sample=True)
    # a box with edge w around a uniform centre keeps w - w^2/4 of an edge on average; w^2 is uniform
    w = torch.linspace(0, 1, 100_001).sqrt()
    expected = ((w - w**2 / 4) ** 2).mean()
    assert abs(float((1 - mix.share).mean() - expected)) < 0.02


def test_a_share_of_one_is_the_identity():
    images, labels = torch.rand(4, 3, 5, 5), soft_labels(4)
    mix = Mix(torch.tensor([1, 2, 3, 0]), torch.ones(4))
    assert torch.equal(mix.pixels(images), images) and torch.equal(mix.labels(labels), labels)
    masked = from_mask(torch.ones(4, 5, 5).bool(), mix.partner)
    assert torch.equal(masked.pixels(images), images) and torch.equal(masked.labels(labels), labels)


def test_mixup_blends_images_and_any_outputs_with_one_share():
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.25, 1.0]))
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    assert mix.pixels(images).flatten().tolist() == [0.75, 1.0]
    assert mix.labels(torch.tensor([[4.0, 0.0], [0.0, 4.0]])).tolist() == [[1.0, 3.0], [0.0, 4.0]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=15), st.integers(0, 99), st.booleans())
def test_a_grouped_permutation_never_leaves_its_group(groups, seed, derange):
    torch.manual_seed(seed)
    group = torch.tensor(groups)
    partner = permutation(len(groups), group=group, derange=derange)
    assert partner.sort().values.tolist() == list(range(len(groups)))
    assert torch.equal(group[partner], group)
    if derange:
        alone = torch.bincount(group)[group] == 1
        assert torch.equal(partner == torch.arange(len(groups)), alone)


def test_selfmix_leaves_equal_labels_unchanged_and_batch_cutmix_does_not():
    torch.manual_seed(0)
    index = torch.arange(4).repeat_interleave(3)
    labels = torch.nn.functional.one_hot(index, 4).float()
    within = cutmix(12, (8, 8), partner=permutation(12, group=index, derange=True))
    assert torch.allclose(within.labels(labels), labels)
    across = mixup(12, 1.0, partner=permutation(12, derange=True))
    assert not torch.allclose(across.labels(labels), labels)


def test_permutations_are_uniform():
    torch.manual_seed(0)
    counts = torch.zeros(3, 3)
    for _ in range(3000):
        counts[torch.arange(3), permutation(3, group=torch.tensor([7, 7, 7]))] += 1
    assert ((counts / 3000 - 1 / 3).abs() < 0.04).all()


def test_integers_are_refused_where_they_cannot_blend():
    mix = mixup(2, 1.0)
    with pytest.raises(TypeError, match="class maps need a mask"):
        mix.pixels(torch.zeros(2, 4, 4).long())
    with pytest.raises(TypeError, match="one_hot"):
        mix.labels(torch.zeros(2).long())


def test_a_choice_between_mixup_and_cutmix_follows_the_switch_and_passes_the_partner_on():
    torch.manual_seed(0)
    partner = torch.tensor([1, 2, 3, 0])
    drawn = [mixup_or_cutmix(4, (6, 6), switch_probability=0.25, partner=partner) for _ in range(400)]
    assert all(torch.equal(mix.partner, partner) and len(mix.share.unique()) == 1 for mix in drawn)
    assert abs(sum(mix.mask is not None for mix in drawn) / 400 - 0.25) < 0.07
