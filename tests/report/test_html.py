from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from limbeck.errors import UserError
from limbeck.evaluate import Comparison, reliability
from limbeck.report import image_grid, write_report

HOSTILE = "<script>alert('x')</script>&\"$%"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def comparison():
    row = {"accuracy": 0.9, "ece": 0.02, "parameters": 5000, "latency_ms": 1.0}
    arms = {"kd": [row, row | {"accuracy": 0.92}], HOSTILE: [row | {"parameters": 900}] * 2}
    return Comparison(
        arms, [0, 1], expectations=["kd.accuracy > 0.905", "kd.ece > 0.5"], data={"name": HOSTILE}, seconds=61
    )


@pytest.fixture
def written(comparison, tmp_path):
    return write_report(
        tmp_path / "new folder" / "report.html",
        title=HOSTILE,
        comparison=comparison,
        curves={HOSTILE: [{"step": step, "epoch": 0, "accuracy": 0.4, "loss": 1.0} for step in (1, 2)]},
        reliability={HOSTILE: reliability(torch.eye(4), torch.arange(4))},
        figures={"teacher": {HOSTILE: image_grid(torch.rand(3, 1, 8, 8))}},
        configuration=HOSTILE,
        notes=[HOSTILE],
    )


def test_text_from_outside_stays_text(written):
    text = written.read_text()
    page = Page(text)
    assert not page.all("script") and "<script" not in text
    assert page.text.count(HOSTILE) >= 6  # title, heading, data, note, arm, caption, configuration


def test_the_page_asks_for_nothing_from_outside(written):
    text = written.read_text()
    page = Page(text)
    assert not page.all("link") and not page.all("a")
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.all("meta"))


def test_every_picture_has_a_description_and_is_well_formed(written):
    from xml.etree import ElementTree

    pictures = Page(written.read_text()).all("img")
    # two metrics' seeds, size, latency, two curves, one reliability diagram, one grid
    assert len(pictures) == 8
    for picture in pictures:
        kind, _, data = picture["src"].partition(";base64,")
        content = base64.b64decode(data, validate=True)
        assert len(picture["alt"]) > 15
        if kind.endswith("svg+xml"):
            assert ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content.startswith(b"\x89PNG")


def test_the_page_says_which_claims_hold(written):
    page = Page(written.read_text())
    text = re.sub(r"\s+", " ", page.text)
    assert "✓ holds kd.accuracy > 0.905" in text and "✗ does not hold kd.ece > 0.5" in text
    assert "true for 1 of 2 seeds" in text and "1 min 1 s" in text


def test_the_page_adapts_to_a_narrow_screen(written):
    text = written.read_text()
    assert 'name="viewport"' in text and "@media (max-width: 600px)" in text


def test_sections_without_content_are_left_out(tmp_path):
    comparison = Comparison({"kd": [{"accuracy": 0.9}]}, [0])
    page = Page(write_report(tmp_path / "r.html", title="One run", comparison=comparison).read_text())
    assert not page.all("img")
    for heading in ("Claims", "Training", "Calibration", "What it does", "Configuration", "Size and latency"):
        assert heading not in page.text
    assert "90.00" in page.text and "One seed." in page.text


def test_the_same_results_give_the_same_file(comparison, tmp_path):
    files = [write_report(tmp_path / name, title="T", comparison=comparison).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_no_file_is_left_when_an_argument_is_wrong(comparison, tmp_path):
    with pytest.raises(UserError, match="no metric 'miou'"):
        write_report(tmp_path / "r.html", title="T", comparison=comparison, metrics=["miou"])
    with pytest.raises(UserError, match="No history row has 'miou'"):
        write_report(tmp_path / "r.html", title="T", comparison=comparison, curves={}, curve_metrics=["miou"])
    assert not list(tmp_path.iterdir())


def test_pictures_that_all_arms_share_stand_there_once_and_others_with_their_arm(comparison, tmp_path):
    same, ones, zeros = torch.rand(3, 1, 8, 8), torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    figures = {
        "a": {"test samples": image_grid(same), "answers": image_grid(ones)},
        "b": {"test samples": image_grid(same), "answers": image_grid(zeros)},
    }
    text = write_report(tmp_path / "r.html", title="t", comparison=comparison, figures=figures).read_text()
    captions = [part.split("<")[0] for part in text.split("<figcaption>")[1:]]
    assert captions == ["test samples", "a: answers", "b: answers"]
