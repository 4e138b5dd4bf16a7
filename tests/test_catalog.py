from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck import catalog
from limbeck.errors import UserError

REPOSITORY = Path(__file__).parents[1]
DHO = {
    "slug": "dho",
    "name": "DHO",
    "paper": '"Dual-Head Optimization: few labels"',
    "arxiv": '"2505.07670"',
    "year": "2025",
    "task": "classification, multimodal   # folder is few_labels",
    "teacher": "frozen",
    "signal": "logits",
    "labels": "few",
    "summary": "Two heads learn from labels and from the teacher.",
    "object": "DHO",
}
FOURD = DHO | {"slug": "4dgen", "name": "4DGen", "paper": '""', "task": "generation"}
FOURD |= {"labels": "none", "teacher": "self"}


def write_card(root: Path, family: str, module: str, values: dict, body: str = "# Title\n\nText.\n") -> Path:
    path = root / family / f"{module}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    front = "".join(f"{key}: {value}\n" for key, value in values.items())
    path.write_text(f"---\n{front}---\n{body}", encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_card(tmp_path, "few_labels", "dho", DHO)
    write_card(tmp_path, "generation", "fourdgen", FOURD)
    write_card(tmp_path, "classification", "kd", DHO | {"slug": "kd", "name": "KD", "task": "classification",
                                                        "labels": "full", "summary": "Match a teacher.",
                                                        "paper": '"Distilling the knowledge"',
                                                        "reference": "true"})  # fmt: skip
    return tmp_path


def test_a_card_becomes_a_system_with_unquoted_text_and_no_comments(root):
    dho = catalog.system("dho", root)
    assert (dho.paper, dho.arxiv, dho.year) == ("Dual-Head Optimization: few labels", "2505.07670", 2025)
    assert dho.task == "classification, multimodal"
    assert (dho.family, dho.module, dho.reference) == ("few_labels", "limbeck.methods.few_labels.dho", False)


@pytest.mark.parametrize(("slug", "module"), [("ps-kd", "ps_kd"), ("4dgen", "fourdgen"), ("m2mkd", "m2mkd")])
def test_the_module_name_follows_from_the_slug(slug, module):
    assert catalog.module_name(slug) == module


def test_systems_come_by_family_then_slug(root):
    assert [each.slug for each in catalog.systems(root)] == ["kd", "dho", "4dgen"]


@pytest.mark.parametrize("key", ["slug", "name", "paper", "arxiv", "year", "teacher", "labels", "object"])
def test_a_missing_key_is_named_together_with_its_card(root, key):
    write_card(root, "few_labels", "dho", {k: v for k, v in DHO.items() if k != key})
    with pytest.raises(UserError, match=rf"few_labels/dho\.md has no '{key}'"):
        catalog.systems(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refernce": "true"}, "unknown key 'refernce'"),
        ({"slug": "dh-o"}, r"belongs into dh_o\.md"),
        ({"year": "soon"}, "year 'soon'"),
        ({"reference": "yes"}, "write true or false"),
        ({"paper": "Two: parts"}, "needs double quotes around the value of 'paper'"),
        ({"paper": '"open'}, "unfinished quoted value for 'paper'"),
    ],
)
def test_a_defective_card_is_one_sentence(root, change, message):
    write_card(root, "few_labels", "dho", DHO | change)
    with pytest.raises(UserError, match=message):
        catalog.systems(root)


def test_a_card_without_front_matter_is_named(root):
    (root / "few_labels" / "other.md").write_text("# Other\n")
    with pytest.raises(UserError, match=r"few_labels/other\.md has no front matter"):
        catalog.systems(root)


def test_two_cards_with_one_slug_are_both_named(root):
    write_card(root, "classification", "dho", DHO)
    with pytest.raises(UserError, match=r"few_labels/dho\.md has the slug 'dho', as classification/dho\.md"):
        catalog.systems(root)


@pytest.mark.parametrize(("typed", "meant"), [("dhoo", "dho"), ("4d_gen", "4dgen"), ("DHO", "dho")])
def test_an_unknown_slug_gets_the_nearest_name(root, typed, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        catalog.system(typed, root)


def test_an_unknown_slug_far_from_every_name_gets_no_suggestion(root):
    with pytest.raises(UserError, match=r"no system 'xyzzyq';"):
        catalog.system("xyzzyq", root)


def test_a_slug_ranks_above_a_word_in_a_summary(root):
    other = {"slug": "zz", "name": "ZZ", "summary": "Better than DHO is.", "paper": '""'}
    write_card(root, "few_labels", "zz", DHO | other)
    assert [each.slug for each in catalog.find("dho", root=root)] == ["dho", "zz"]


def test_more_matching_words_rank_above_fewer(root):
    assert [each.slug for each in catalog.find("two heads teacher 4DGen", root=root)] == ["4dgen"]
    assert {each.slug for each in catalog.find(["two", "heads"], root=root)} == {"dho", "4dgen"}


def test_no_words_find_everything_and_nonsense_finds_nothing(root):
    assert len(catalog.find(root=root)) == 3
    assert catalog.find("qqqq", root=root) == []


def test_filters_keep_only_systems_with_that_value(root):
    assert [s.slug for s in catalog.find(task="classification", root=root)] == ["kd", "dho"]
    assert [s.slug for s in catalog.find(task="few-labels", root=root)] == ["dho"]
    assert [s.slug for s in catalog.find(labels="none", teacher="Self", root=root)] == ["4dgen"]
    assert catalog.find(labels="none", teacher="frozen", root=root) == []


def test_a_filter_value_that_no_system_has_lists_the_values(root):
    with pytest.raises(UserError, match="labels 'some'; there are: few, full, none"):
        catalog.find(labels="some", root=root)


def test_the_card_is_shown_without_its_front_matter(root):
    assert catalog.card("dho", root) == "# Title\n\nText.\n"


def claim(**change):
    return {"expectation": "dho.accuracy > kd.accuracy", "holds": True, "difference": 0.0523, "p": 0.0031,
            "seeds_holding": 5, "seeds": 5} | change  # fmt: skip


def test_the_table_tells_measured_from_unmeasured_claims(root, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    claims = [claim(), claim(holds=False, p=None, difference=-0.1)]
    (results / "dho.json").write_text(json.dumps({"claims": claims}))
    kd, dho, fourd = catalog.table_markdown(root, results, base=root).splitlines()[2:]
    assert dho.startswith("| [dho](few_labels/dho.md) | DHO | classification, multimodal | frozen | few | 1 of 2 |")
    assert "+0.0523 (5 of 5 seeds, p = 0.0031)" in dho and "-0.1 (5 of 5 seeds)" in dho
    assert "| reference |" in kd
    assert "| not measured |" in fourd


def test_updating_the_table_changes_only_what_is_between_the_markers(root, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- systems -->\nformer table\n<!-- /systems -->\nafter\n")
    assert catalog.update_table(readme, root, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- systems -->\n| system |")
    assert text.endswith("<!-- /systems -->\nafter\n")
    assert "former table" not in text
    assert not catalog.update_table(readme, root, tmp_path)


def test_a_readme_without_markers_is_refused(root, tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(UserError, match=r"README\.md has no '<!-- systems -->'"):
        catalog.update_table(tmp_path / "README.md", root)


def test_the_readme_of_the_repository_is_up_to_date(tmp_path):
    readme = REPOSITORY / "README.md"
    if not readme.is_file() or catalog.TABLE_START not in readme.read_text(encoding="utf-8"):
        pytest.skip("README.md has no table of systems yet")
    table = catalog.table_markdown(base=REPOSITORY)
    assert table in readme.read_text(encoding="utf-8"), "run limbeck.catalog.update_table(README.md)"


@pytest.mark.parametrize("path", sorted(catalog.METHODS.glob("*/*.md")), ids=lambda path: path.stem)
def test_every_front_matter_is_yaml_that_means_the_same(path):
    import yaml

    front = catalog._split(path)[0]
    expected = {key: "" if value is None else value for key, value in yaml.safe_load(front).items()}
    expected["year"] = str(expected["year"])
    if "reference" in expected:
        expected["reference"] = str(expected["reference"]).lower()
    assert catalog._parse(path, front) == expected


@pytest.mark.parametrize("slug", [each.slug for each in catalog.systems()])
def test_every_card_names_an_object_that_its_module_defines(slug):
    assert callable(catalog.load(slug))


def test_the_catalog_imports_no_torch_and_answers_fast_with_111_cards(tmp_path):
    body = "A line of a card's text, as long as those of real cards are.\n" * 120
    for number in range(111):
        write_card(tmp_path, "few_labels", f"dho_{number}", DHO | {"slug": f"dho-{number}"}, body)
    code = (
        "import sys, pathlib, limbeck.catalog as c; "
        f"assert len(c.systems(pathlib.Path({str(tmp_path)!r}))) == 111; "
        "assert not {'torch', 'yaml'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds  # measured 0.05 to 0.1 s; the bound leaves room for a busy machine
