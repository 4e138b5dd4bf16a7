"""Nearest neighbours of embeddings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.data import Samples
from limbeck.errors import UserError
from limbeck.evaluate import NearestNeighbours
from limbeck.evaluate.neighbours import vote


def test_votes_are_weighted_by_the_exponent_of_the_cosine():
    torch.manual_seed(0)
    given, known, labels = torch.randn(4, 6), torch.randn(9, 6), torch.arange(9) % 3
    cosine = F.normalize(given, dim=1) @ F.normalize(known, dim=1).T
    for row in range(4):
        expected = torch.zeros(3)
        for place in cosine[row].argsort(descending=True)[:5]:
            expected[labels[place]] += (cosine[row, place] / 0.07).exp()
        found = vote(given, known, labels, 3, k=5)[row]
        torch.testing.assert_close(found, expected / expected.sum())


def test_one_neighbour_is_the_nearest_ones_class():
    known = torch.eye(3)
    assert vote(torch.tensor([[0.1, 5.0, 0.2]]), known, torch.tensor([0, 2, 1]), 3, k=1).argmax(1).tolist() == [2]


def test_the_length_of_an_embedding_does_not_matter_and_few_known_all_vote():
    given, known, labels = torch.randn(4, 6), torch.randn(3, 6), torch.arange(3)
    torch.testing.assert_close(vote(given * 7, known, labels, 3, k=20), vote(given, known, labels, 3, k=3))


def test_samples_are_their_own_neighbours():
    samples = Samples({"image": torch.rand(12, 1, 2, 2), "label": torch.arange(12) % 4})
    assert NearestNeighbours(samples, k=1)(nn.Flatten(), samples) == {"knn_accuracy": 1.0}


def test_without_known_samples_there_is_nothing_to_be_near_to():
    samples = Samples({"image": torch.rand(4, 1, 2, 2), "label": torch.arange(4)})
    with pytest.raises(UserError, match="labelled samples"):
        NearestNeighbours(samples.select([]))(nn.Flatten(), samples)
