"""The tables of `benchmarks/README.md`, made from `benchmarks/results/*.json`.

    python -m benchmarks.tables

Between `<!-- NAME -->` and `<!-- /NAME -->` the README holds the table of `results/NAME.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, shown

README = Path(__file__).parent / "README.md"
WORDS = {
    "cpu": "{}",
    "gpu": "{}",
    "cores": "{} cores",
    "threads": "{} threads",
    "torch": "torch {}",
}


def names(text: str) -> list[str]:
    """The tables that a README has room for."""
    return re.findall(r"^<!-- ([a-z][\w-]*) -->$", text, flags=re.MULTILINE)


def table(content: dict[str, Any]) -> str:
    """The rows of one file in Markdown, and below them the machine and what was set."""
    columns = list(dict.fromkeys(name for row in content["rows"] for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(name)) for name in columns] for row in content["rows"]]
    where, settings = content["machine"], content.get("settings", {})
    machine = ", ".join(words.format(_cell(where[name])) for name, words in WORDS.items() if name in where)
    told = ", ".join(f"{name} {_cell(value)}" for name, value in settings.items() if value is not None)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{machine}; {told}.\n"


def update(readme: Path = README, results: Path = RESULTS) -> bool:
    """Put every table in its place; whether the README changed."""
    text = new = readme.read_text(encoding="utf-8")
    for name in names(text):
        made = table(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = new.partition(start)
        new = before + start + made + end + rest.partition(end)[2]
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def _cell(value: Any) -> str:
    return " x ".join(map(shown, value)) if isinstance(value, list) else shown(value)


if __name__ == "__main__":
    print("benchmarks/README.md was", "updated" if update() else "up to date")
