"""Which systems there are: reads the cards' front matter, searches them, and fills the table in the docs.

A system is a module and a card side by side, `limbeck/methods/<family>/<module>.md`; the card opens with
`key: value` lines between two `---` lines. Imports neither torch nor yaml, so that the command line answers
before a reader notices; each front matter is nevertheless valid YAML, which the tests check.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.errors import UserError

METHODS = Path(__file__).parent / "methods"
RESULTS = Path(__file__).parent.parent / "results"
TABLE_START, TABLE_END = "<!-- systems -->", "<!-- /systems -->"

_REQUIRED = (
    "slug", "name", "paper", "arxiv", "year", "task", "teacher", "signal", "labels", "summary", "object",
)  # fmt: skip
_MAY_BE_EMPTY = ("paper", "arxiv")
_OPTIONAL = ("reference", "tags")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WEIGHTS = {
    "slug": 8, "name": 8, "tags": 4, "paper": 3, "summary": 2, "task": 2, "signal": 2,
    "teacher": 1, "labels": 1,
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """One published system (or a reference method) as its card's front matter describes it.

    `task`, `teacher`, `signal`, `labels` and `tags` may hold several words separated by commas. `family` is
    the folder under `limbeck/methods`, `module` the import path, `object` the class or function in it, and
    `reference` is true for baselines that are not among the 111.
    """

    slug: str
    name: str
    paper: str
    arxiv: str
    year: int
    task: str
    teacher: str
    signal: str
    labels: str
    summary: str
    object: str
    reference: bool
    tags: str
    family: str
    module: str
    card: Path


def module_name(slug: str) -> str:
    """The Python module of a slug: `-` becomes `_`, a leading digit is spelled out (`4dgen`: `fourdgen`)."""
    spelled = _DIGITS[int(slug[0])] + slug[1:] if slug[:1].isdecimal() else slug
    return spelled.replace("-", "_")


def systems(root: Path | None = None) -> list[System]:
    """Every system that has a card under `root` (default: the package's methods), by family, then slug.

    Raises UserError naming the card and the key when a front matter is absent, incomplete, misspelt, or
    contradicts the card's file name, and when two cards share a slug.
    """
    found = [_read(path) for path in sorted((root or METHODS).glob("*/*.md"))]
    cards: dict[str, Path] = {}
    for each in found:
        if each.slug in cards:
            raise _defect(each.card, f"has the slug '{each.slug}', as {_short(cards[each.slug])} has; rename one")
        cards[each.slug] = each.card
    return sorted(found, key=lambda each: (each.family, each.slug))


def system(slug: str, root: Path | None = None) -> System:
    """The system called `slug`. Raises UserError with the nearest name when there is none."""
    every = systems(root)
    for each in every:
        if each.slug == slug:
            return each
    raise UserError(f"There is no system '{slug}'{_nearest(slug, every)}; `limbeck methods` lists all of them.")


def find(
    words: str | Iterable[str] = "",
    task: str | None = None,
    labels: str | None = None,
    teacher: str | None = None,
    root: Path | None = None,
) -> list[System]:
    """The systems that contain the most of `words`, best match first; all of them when `words` is empty.

    A word counts when it occurs in slug, name, tags, paper, summary, task, signal, teacher or labels, in
    upper or lower case; a whole word weighs twice as much as a part of one. `task` (or the family's name),
    `labels` and `teacher` keep only the systems with that value. Raises UserError when no system has it.
    """
    every = kept = systems(root)
    for key, wanted in (("task", task), ("labels", labels), ("teacher", teacher)):
        if wanted is not None:
            kept = _having(kept, every, key, wanted)
    wanted_words = (words if isinstance(words, str) else " ".join(words)).lower().split()
    if not wanted_words:
        return kept
    ranked = [(_match(each, wanted_words), each) for each in kept]
    most = max((count for (count, _), _ in ranked), default=0)
    best = [(score, each) for (count, score), each in ranked if count == most and count > 0]
    return [each for _, each in sorted(best, key=lambda pair: (-pair[0], pair[1].slug))]


def card(slug: str, root: Path | None = None) -> str:
    """The card's text without its front matter. An unknown slug raises UserError with the nearest name."""
    return _split(system(slug, root).card)[1].strip() + "\n"


def load(slug: str) -> Any:
    """Imports the system's module (and with it torch) and returns its class or function."""
    import importlib

    found = system(slug)
    module = importlib.import_module(found.module)
    if not hasattr(module, found.object):
        raise UserError(
            f"The card of '{slug}' names the object '{found.object}', which {found.module} does not define; "
            "correct `object` in the card."
        )
    return getattr(module, found.object)


def table_markdown(root: Path | None = None, results: Path | None = None, base: Path | None = None) -> str:
    """The table of systems in Markdown: what each is, whether its claims hold, and the measured differences.

    `results` is the folder of `<slug>.json` files that `limbeck prove` writes (default: beside the package);
    `base` is the folder that the links to the cards are relative to (default: the repository's root).
    """
    base = (base or METHODS.parent.parent).resolve()
    rows = [
        "| system | name | task | teacher | labels | claim holds | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in systems(root):
        link = Path(os.path.relpath(each.card.resolve(), base)).as_posix()
        holds, measured = _verdict(each, results or RESULTS)
        cells = (f"[{each.slug}]({link})", each.name, each.task, each.teacher, each.labels, holds, measured)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def update_table(readme: Path, root: Path | None = None, results: Path | None = None) -> bool:
    """Replaces what stands between `<!-- systems -->` and `<!-- /systems -->` in `readme` by the table.

    Returns whether the file changed. Raises UserError when the two markers are not there.
    """
    text = readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise UserError(f"{readme.name} has no '{TABLE_START}' followed by '{TABLE_END}'; add both lines.")
    new = f"{before}{start}\n{table_markdown(root, results, readme.parent)}{end}{after}"
    if new == text:
        return False
    readme.write_text(new, encoding="utf-8")
    return True


def _read(path: Path) -> System:
    values = _parse(path, _split(path)[0])
    for key in _REQUIRED:
        if key not in values or (not values[key] and key not in _MAY_BE_EMPTY):
            raise _defect(path, f"has no '{key}' in its front matter; add a line '{key}: ...'")
    unknown = sorted(set(values) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise _defect(path, f"has the unknown key '{unknown[0]}' in its front matter; correct or remove it")
    if module_name(values["slug"]) != path.stem:
        belongs = f"{module_name(values['slug'])}.md"
        raise _defect(path, f"has the slug '{values['slug']}', which belongs into {belongs}; rename one of them")
    year, reference = values.pop("year"), values.pop("reference", "false")
    if not year.isdecimal():
        raise _defect(path, f"has the year '{year}'; write four digits")
    if reference not in ("true", "false"):
        raise _defect(path, f"has 'reference: {reference}'; write true or false")
    return System(
        **{"tags": "", **values},
        year=int(year),
        reference=reference == "true",
        family=path.parent.name,
        module=f"limbeck.methods.{path.parent.name}.{path.stem}",
        card=path,
    )


def _split(path: Path) -> tuple[str, str]:
    """The front matter (without its `---` lines) and the text of a card."""
    text = path.read_text(encoding="utf-8")
    front, found, body = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not found:
        raise _defect(path, "has no front matter; open it with 'key: value' lines between two '---' lines")
    return front, body


def _parse(path: Path, front: str) -> dict[str, str]:
    """`key: value` lines: the part of YAML that cards use, plain or double-quoted values, `#` comments."""
    values: dict[str, str] = {}
    for line in front.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        if not colon or key != key.strip() or key in values:
            raise _defect(path, f"has the line '{line}' in its front matter; write 'key: value', each key once")
        values[key] = _value(path, key, value.strip())
    return values


def _value(path: Path, key: str, text: str) -> str:
    if text.startswith('"'):
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as error:
            raise _defect(path, f"has an unfinished quoted value for '{key}'; close the quotes") from error
        rest = text[end:].strip()
        if rest and not rest.startswith("#"):
            raise _defect(path, f"has text after the quoted value of '{key}'; put it inside the quotes")
        return value
    plain = "" if text.startswith("#") else text.partition(" #")[0].rstrip()
    # YAML would read these as a mapping, a list, a block or an alias, not as the text that is meant.
    if ": " in plain or plain.endswith(":") or plain[:1] in tuple("'[]{}>|*&!%@`,"):
        raise _defect(path, f"needs double quotes around the value of '{key}', which is {plain}")
    return plain


def _defect(path: Path, what: str) -> UserError:
    return UserError(f"The card {_short(path)} {what}.")


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _nearest(slug: str, every: list[System]) -> str:
    import difflib

    names = {**{each.name.lower(): each.slug for each in every}, **{each.slug: each.slug for each in every}}
    close = difflib.get_close_matches(slug.lower().replace("_", "-"), names, n=1, cutoff=0.5)
    return f"; did you mean '{names[close[0]]}'?" if close else ""


def _having(kept: list[System], every: list[System], key: str, wanted: str) -> list[System]:
    """Those of `kept` whose `key` has the value `wanted`, which at least one of `every` must have."""

    def values(each: System) -> list[str]:
        words = [word.strip() for word in getattr(each, key).split(",")]
        return words + [each.family] if key == "task" else words

    known = sorted({value for each in every for value in values(each)})
    if _plain(wanted) not in map(_plain, known):
        raise UserError(f"No system has the {key} '{wanted}'; there are: {', '.join(known)}.")
    return [each for each in kept if _plain(wanted) in map(_plain, values(each))]


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")


def _match(each: System, words: list[str]) -> tuple[int, int]:
    """How many of `words` occur in the system, and the summed weight of the places where they do."""
    scores = dict.fromkeys(words, 0)
    for key, weight in _WEIGHTS.items():
        text = getattr(each, key).lower()
        whole = {text, *text.replace(",", " ").replace("-", " ").split()}
        for word in scores:
            scores[word] += weight * ((word in text) + (word in whole))
    return sum(score > 0 for score in scores.values()), sum(scores.values())


def _verdict(each: System, results: Path) -> tuple[str, str]:
    """The cells 'claim holds' and 'measured' from the system's results file."""
    path = results / f"{each.slug}.json"
    if each.reference:
        return "reference", ""
    if not path.is_file():
        return "not measured", ""
    claims = json.loads(path.read_text(encoding="utf-8"))["claims"]
    held = sum(claim["holds"] for claim in claims)
    holds = {len(claims): "yes", 0: "no"}.get(held, f"{held} of {len(claims)}")
    return holds, "<br>".join(_measured(claim) for claim in claims)


def _measured(claim: dict[str, Any]) -> str:
    p = "" if claim["p"] is None else f", p = {claim['p']:.2g}"
    seeds = f"{claim['seeds_holding']} of {claim['seeds']} seeds"
    return f"`{claim['expectation']}`: {claim['difference']:+.3g} ({seeds}{p})"
