"""Several systems over the same seeds, and the measurement of a system's claim."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from limbeck import catalog
from limbeck.errors import UserError
from limbeck.evaluate import Comparison, Reliability
from limbeck.files import write_text
from limbeck.recipes import recipe as recipes
from limbeck.recipes.run import MACHINE, Result, run
from limbeck.recipes.tasks.task import describe
from limbeck.report import column_of, write_report
from limbeck.train.logs import Row


@dataclass
class Page:
    """The runs of a comparison as they finish: metrics of all of them, and of each arm's first run the curves, the
    calibration and what people look at."""

    rows: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    curves: dict[str, list[Row]] = field(default_factory=dict)
    calibration: dict[str, Reliability] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)

    def add(self, arm: str, result: Result) -> str:
        """Take in a run: its test metrics and the means of what it logged. Returns it in a few words."""
        self.rows.setdefault(arm, []).append({**result.metrics, **_logged(result)})
        if arm not in self.curves:
            self.curves[arm] = result.fit.train + result.fit.validation
            if diagram := result.task.reliability(result.student, result.data):
                self.calibration[arm] = diagram
            self.configs[arm] = result.config
            self.data = self.data or describe(result.data)
            self.columns = self.columns or result.task.columns
            self.figures[arm] = result.figures()
        main = column_of(result.task.columns[0])
        value = f"{main.number(result.metrics[main.metric])} {main.unit}".strip()
        return f"{main.title} {value}, {result.metrics['seconds']:5.1f} s"

    def comparison(self, seeds: Sequence[int]) -> Comparison:
        """All metrics, arm by arm and seed by seed."""
        return Comparison(self.rows, list(seeds), data=self.data, config={"arms": self.configs})


def compare(
    arms: Mapping[str, str | Path | Mapping[str, Any]] | Sequence[str],
    *,
    seeds: int = 3,
    settings: Mapping[str, Any] | None = None,
    workspace: str | Path = "runs/compare",
    allow_imports: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run every arm with seeds 0, 1, ... on the same splits and initial weights, and write a table and a report.

    Args:
        arms: recipes by name, or slugs and files. Systems that share data, student and trainer compare best: their
            own recipes may differ in these, so set what must be equal by `settings`.
        settings: dotted keys for all arms.
        workspace: one folder a run below it; finished runs are loaded, not repeated.
        say: is told of every finished run.
    """
    named = dict(arms) if isinstance(arms, Mapping) else {recipes.name_of(arm): arm for arm in arms}
    contents = {arm: recipes.override(recipes.read(recipe), settings or {}) for arm, recipe in named.items()}
    comparison, page = measure(contents, range(seeds), Path(workspace), allow_imports=allow_imports, say=say)
    write_page(Path(workspace) / "report.html", " against ".join(contents), comparison, page)
    write_text(Path(workspace) / "comparison.json", comparison.to_json())
    return comparison


def measure(
    contents: Mapping[str, Mapping[str, Any]],
    seeds: Iterable[int],
    workspace: Path,
    *,
    allow_imports: bool = False,
    say: Callable[[str], None],
) -> tuple[Comparison, Page]:
    """All arms over all seeds; an arm's metrics of a seed are its test metrics and the means of what it logged."""
    started, seeds, page = time.perf_counter(), list(seeds), Page()
    for seed in seeds:
        for arm, content in contents.items():
            result = run(
                {**content, "seed": seed},
                workspace=workspace / _folder(arm) / f"seed-{seed}",
                allow_imports=allow_imports,
                report=False,
                shared=workspace / "networks",
            )
            say(f"{arm}, seed {seed}: {page.add(arm, result)}")
    comparison = page.comparison(seeds)
    comparison.seconds = time.perf_counter() - started
    return comparison, page


def prove(
    slug: str,
    *,
    seeds: int | None = None,
    workspace: str | Path | None = None,
    results: str | Path = "results",
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure a system's claim: its recipe's `claim` names the arms, the seeds and what is expected.

    Each arm is the recipe with that arm's changes. Writes `<results>/<slug>.json`, whatever comes out, and a report
    in the workspace. Runs that are finished are loaded, so a measurement that was broken off goes on.

    Raises:
        UserError: the recipe states no claim, or an expectation speaks of an unknown arm or metric.
    """
    system = catalog.system(slug)
    content = recipes.read(slug)
    claim = content.pop("claim", None)
    if not claim:
        raise UserError(f"the recipe of {slug} states no claim; add a section 'claim' with 'arms' and 'expect'")
    arms = {arm: recipes.fit_to_method(recipes.merge(content, change or {})) for arm, change in claim["arms"].items()}
    folder = Path(workspace or f"runs/prove-{slug}")
    count = seeds or claim.get("seeds", 5)
    comparison, page = measure(arms, range(count), folder, say=say)
    comparison.slug, comparison.expectations = slug, list(claim["expect"])
    comparison.config = {"recipe": content, "arms": claim["arms"]}
    comparison.verdicts()  # an expectation that names what there is not fails before anything is written
    write_page(folder / "report.html", f"The claim of {system.name}", comparison, page)
    write_text(Path(results) / f"{slug}.json", comparison.to_json())
    return comparison


def write_page(path: Path, title: str, comparison: Comparison, page: Page, context: Sequence[str] = ()) -> None:
    """The report of a comparison."""
    sizes = ", ".join(f"{name} {value}" for name, value in page.data.items())
    write_report(
        path,
        title=title,
        comparison=comparison,
        metrics=[name for name in page.columns if name in comparison.metrics()],
        context=context,
        curves=page.curves,
        reliability=page.calibration,
        figures=page.figures,
        configuration=yaml.safe_dump(comparison.config, sort_keys=False),
        notes=[f"Data: {sizes}. Curves and reliability diagrams are of the first seed."],
    )


def _logged(result: Result) -> dict[str, float]:
    """Means over the run of what the method logged, as `train.<name>`."""
    named = {f"train.{name}": value for name, value in result.logged.items()}
    return {name: value for name, value in named.items() if not name.endswith(MACHINE)}


def _folder(arm: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in arm)
