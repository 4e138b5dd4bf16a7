import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.data import (
    Samples,
    class_mismatch,
    long_tailed,
    noisy_labels,
    only_classes,
    partition_clients,
    split_labels,
    subset,
    train_validation,
)
from limbeck.errors import UserError

SEEDS = st.integers(0, 1000)
COUNTS = st.lists(st.integers(1, 30), min_size=2, max_size=5)


def samples(counts, seed=0):
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(seed))]
    return Samples({"label": label}, [f"class {c}" for c in range(len(counts))])


def sizes(part):
    return torch.bincount(part.labels, minlength=part.num_classes)


def assert_same(a, b):
    assert torch.equal(a.index, b.index)


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.integers(1, 5), st.booleans())
def test_labels_per_class_are_exact_and_the_rest_is_disjoint_and_complete(counts, seed, k, keep):
    assume(min(counts) >= k)
    whole = samples(counts)
    labelled, unlabelled = split_labels(whole, labels_per_class=k, keep_labelled_in_unlabelled=keep, seed=seed)
    assert sizes(labelled).tolist() == [k] * len(counts)
    assert torch.equal(whole.labels[labelled.index], labelled.labels)
    assert "label" not in unlabelled.fields
    parts = unlabelled.index if keep else torch.cat([labelled.index, unlabelled.index])
    assert parts.sort().values.tolist() == list(range(len(whole)))
    again = split_labels(whole, labels_per_class=k, keep_labelled_in_unlabelled=keep, seed=seed)
    assert_same(labelled, again[0])


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.floats(0.05, 0.95))
def test_a_labelled_fraction_is_exact_in_all_and_near_in_each_class(counts, seed, fraction):
    n = round(fraction * sum(counts))
    assume(n >= len(counts))
    labelled, _ = split_labels(samples(counts), labelled_fraction=fraction, keep_labelled_in_unlabelled=True, seed=seed)
    assert len(labelled) == n and (sizes(labelled) >= 1).all()
    if min(c * fraction for c in counts) >= 1:
        wanted = torch.tensor(counts) * n / sum(counts)
        assert ((sizes(labelled) - wanted).abs() < 1).all()


def test_too_few_labels_are_named_with_the_class_and_the_counts():
    with pytest.raises(UserError, match=r"Class 'class 1' has 3 labels but 4 were asked for \(1 of 2 classes"):
        split_labels(samples([9, 3]), labels_per_class=4, keep_labelled_in_unlabelled=True, seed=0)
    with pytest.raises(UserError, match="2 labels are fewer than the 3 classes"):
        split_labels(samples([5, 5, 5]), labelled_fraction=0.1, keep_labelled_in_unlabelled=True, seed=0)
    with pytest.raises(UserError, match="either labels_per_class or labelled_fraction"):
        split_labels(samples([5, 5]), keep_labelled_in_unlabelled=True, seed=0)


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.data())
def test_a_subset_has_exactly_n_samples_in_proportion(counts, seed, data):
    n = data.draw(st.integers(1, sum(counts)))
    part = subset(samples(counts), n, seed)
    assert len(part) == n == len(set(part.index.tolist()))
    assert ((sizes(part) - torch.tensor(counts) * n / sum(counts)).abs() < 1).all()
    assert_same(part, subset(samples(counts), n, seed))


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.floats(0.1, 0.9))
def test_train_and_validation_are_disjoint_and_complete(counts, seed, fraction):
    train, validation = train_validation(samples(counts), fraction, seed)
    assert len(validation) == max(1, round(fraction * sum(counts)))
    assert sorted(train.index.tolist() + validation.index.tolist()) == list(range(sum(counts)))


def test_different_seeds_give_different_parts():
    whole = samples([50, 50])
    assert not torch.equal(subset(whole, 20, 0).index, subset(whole, 20, 1).index)


def test_a_long_tail_falls_exponentially_from_all_to_one_over_the_imbalance():
    tail = long_tailed(samples([100, 120, 100]), imbalance=100, seed=0)
    assert sizes(tail).tolist() == [100, 10, 1]
    assert sizes(long_tailed(samples([30, 30]), imbalance=1, seed=0)).tolist() == [30, 30]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([None, 12]))
def test_mismatched_unlabelled_samples_have_the_asked_share_of_unknown_classes(seed, ratio, size):
    whole = samples([20, 20, 20, 20])
    labelled, unlabelled = class_mismatch(
        whole, [2, "class 0"], ratio, labels_per_class=4, seed=seed, unlabelled_size=size
    )
    truth = whole.labels[unlabelled.index]
    unknown = int(((truth == 1) | (truth == 3)).sum())
    assert unknown == round(ratio * len(unlabelled))
    assert len(unlabelled) == (size or {0.0: 32, 0.25: 42, 0.5: 64, 1.0: 40}[ratio])
    assert labelled.classes == unlabelled.classes == ["class 2", "class 0"]
    assert torch.equal(whole.labels[labelled.index], torch.tensor([2, 0])[labelled.labels])
    assert not set(labelled.index.tolist()) & set(unlabelled.index.tolist())


def test_mismatch_works_on_a_part_whose_index_has_gaps():
    part = samples([20, 20, 20]).select(torch.arange(0, 60, 2))
    labelled, unlabelled = class_mismatch(part, [0, 1], 0.5, labels_per_class=2, seed=0)
    assert set(labelled.index.tolist() + unlabelled.index.tolist()) <= set(part.index.tolist())
    with pytest.raises(UserError, match="50 unlabelled samples of unknown classes were asked for"):
        class_mismatch(part, [0, 1], 0.5, labels_per_class=2, seed=0, unlabelled_size=100)


def test_only_classes_renumbers_in_the_order_given():
    whole = samples([3, 3, 3])
    chosen = only_classes(whole, ["class 2", 0])
    assert sizes(chosen).tolist() == [3, 3] and chosen.classes == ["class 2", "class 0"]
    with pytest.raises(UserError, match="no class 'cat'"):
        only_classes(whole, ["cat"])


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.integers(1, 4), st.sampled_from([0.1, 1.0, 100.0]))
def test_clients_partition_the_samples(counts, seed, clients, alpha):
    assume(sum(counts) >= 20)
    parts = partition_clients(samples(counts), clients, alpha, seed, minimum=1)
    assert len(parts) == clients and min(map(len, parts)) >= 1
    assert sorted(i for part in parts for i in part.index.tolist()) == list(range(sum(counts)))
    for a, b in zip(parts, partition_clients(samples(counts), clients, alpha, seed), strict=True):
        assert_same(a, b)


def test_small_alpha_gives_clients_of_few_classes_and_large_alpha_equal_clients():
    whole = samples([400] * 5)

    def largest_share(alpha):
        parts = partition_clients(whole, 5, alpha, seed=0)
        return sum(float(sizes(p).max() / len(p)) for p in parts) / 5

    assert largest_share(0.05) > 0.6 and largest_share(1e4) < 0.23


def test_clients_that_cannot_all_be_served_are_refused():
    with pytest.raises(UserError, match="No draw gave each of 5 clients 3 of 10 samples"):
        partition_clients(samples([5, 5]), 5, 1.0, seed=0, minimum=3)


@settings(max_examples=25, deadline=None)
@given(COUNTS, SEEDS, st.floats(0, 1))
def test_exactly_the_asked_share_of_labels_is_wrong(counts, seed, fraction):
    whole = samples(counts)
    noisy = noisy_labels(whole, fraction, seed)
    assert int((noisy.labels != whole.labels).sum()) == round(fraction * len(whole))
    assert torch.equal(noisy.labels, noisy_labels(whole, fraction, seed).labels)


def test_wrong_labels_are_uniform_over_the_other_classes():
    noisy = noisy_labels(samples([9000, 1, 1, 1]), 1.0, seed=0)
    counts = sizes(noisy)[1:].double()
    assert ((counts / 9000 - 1 / 3).abs() < 0.02).all()
