"""Grids of generated images."""

from __future__ import annotations

import io

import pytest
import torch

from limbeck.errors import UserError
from limbeck.report.samples import sample_grid


def drawn(figure) -> torch.Tensor:
    return torch.tensor(figure.axes[0].images[0].get_array())


def test_every_column_shows_its_class():
    label = torch.tensor([0, 1, 1, 0])
    images = label.float().view(-1, 1, 1, 1).expand(4, 1, 3, 3)
    picture = drawn(sample_grid(images, label, ["a", "b"], each=2))
    assert picture.shape == (8, 8, 3)
    assert (picture[:3, :3] == 0).all() and (picture[4:7, 4:7] == 1).all()


def test_classes_without_images_stay_grey_and_names_stand_above():
    figure = sample_grid(torch.zeros(1, 3, 2, 2), torch.tensor([1]), ["no", "yes$"], each=1)
    assert (drawn(figure)[:2, :2] == drawn(figure)[0, 0, 0]).all() and drawn(figure)[0, 0, 0] > 0
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["no", "yes$"]
    figure.savefig(io.BytesIO())


def test_images_without_labels_stand_in_rows_of_ten():
    assert drawn(sample_grid(torch.rand(23, 1, 2, 2), each=3)).shape == (9, 30, 3)


@pytest.mark.parametrize(
    ("images", "label", "words"),
    [
        (torch.zeros(0, 1, 2, 2), None, "N > 0"),
        (torch.zeros(2, 2, 2, 2), None, "1 or 3"),
        (torch.zeros(2, 1, 2, 2), torch.tensor([1]), "2 images and 1 labels"),
    ],
)
def test_what_cannot_be_shown_is_refused(images, label, words):
    with pytest.raises(UserError, match=words):
        sample_grid(images, label)
