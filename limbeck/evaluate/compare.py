"""Arms compared over seeds: means, paired tests, and verdicts on written expectations."""

from __future__ import annotations

import json
import math
import operator
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from scipy import stats

from limbeck.errors import UserError

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_FORM = "write e.g. 'dho.accuracy > supervised.accuracy + 0.01'"


@dataclass(frozen=True)
class Statistics:
    """Mean over the seeds and sample standard deviation (None for a single seed)."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Paired:
    """The difference of two arms, seed by seed.

    `difference` is its mean, `low` to `high` the 95 % confidence interval of the mean (Student's t), `p` the
    two-sided paired t-test and `p_wilcoxon` the exact two-sided signed-rank test, ties and all. The
    interval and `p` are None for a single seed.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_wilcoxon: float


@dataclass(frozen=True)
class Verdict:
    """Whether an expectation holds.

    It `holds` when the difference of the means satisfies it. `difference` is left minus right without the
    expectation's `margin`; `seeds_holding` of `seeds` satisfy it one by one. `p` (paired t-test) and
    `p_wilcoxon` are two-sided for the hypothesis that the difference equals the margin.
    """

    expectation: str
    holds: bool
    difference: float
    margin: float
    p: float | None
    p_wilcoxon: float
    seeds_holding: int
    seeds: int


@dataclass
class Comparison:
    """The metrics of several arms over the same seeds, which is what `results/<slug>.json` holds.

    Args:
        arms: arm to one dict of metrics a seed, in the order of `seeds`. Floats are rounded to 6 significant
            digits, so that a verdict in memory and one from the file agree.
        seeds: the seeds; splits and initialisation of all arms follow from them.
        slug: the system that is measured.
        expectations: what the system claims, see `judge`.
        data: description of the data: name, sizes, labels.
        config: whatever else is needed to repeat it.
        seconds: duration of all of it.
        versions: of what was computed with.

    Raises:
        UserError: no arm, an arm with another number of seeds, seeds whose metrics differ, or a metric that
            is no finite number.
    """

    arms: dict[str, list[dict[str, float]]]
    seeds: list[int]
    slug: str = ""
    expectations: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(
        default_factory=lambda: {"python": platform.python_version(), "torch": str(torch.__version__)}
    )

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise UserError("A comparison needs at least one arm and one seed.")
        for arm, rows in self.arms.items():
            _check_arm(arm, rows, self.seeds)
        self.arms = {arm: [_rounded(dict(row)) for row in rows] for arm, rows in self.arms.items()}

    def metrics(self) -> list[str]:
        """The metrics of any arm, in order of appearance."""
        return list(dict.fromkeys(metric for rows in self.arms.values() for metric in rows[0]))

    def values(self, arm: str, metric: str) -> list[float]:
        """One metric of one arm for each seed. Raises UserError when there is no such arm or metric."""
        if arm not in self.arms:
            raise UserError(f"There is no arm '{arm}'; there are: {', '.join(self.arms)}.")
        if metric not in self.arms[arm][0]:
            raise UserError(f"The arm '{arm}' has no metric '{metric}'; it has: {', '.join(self.arms[arm][0])}.")
        return [row[metric] for row in self.arms[arm]]

    def summary(self) -> dict[str, dict[str, Statistics]]:
        """Mean and sample standard deviation over the seeds: arm to metric to `Statistics`."""
        return {
            arm: {metric: _statistics(self.values(arm, metric)) for metric in rows[0]}
            for arm, rows in self.arms.items()
        }

    def paired(self, arm_a: str, arm_b: str, metric: str) -> Paired:
        """`arm_a` minus `arm_b`, seed by seed."""
        return _paired(_differences(self.values(arm_a, metric), self.values(arm_b, metric)))

    def judge(self, expectation: str) -> Verdict:
        """The verdict on `arm.metric OP arm.metric [+ number]` or `arm.metric OP number`; OP is > < >= <=.

        Arms' names may contain spaces, hyphens and dots; the `+` or `-` of a margin stands between spaces.

        Raises:
            UserError: an unknown arm or metric, or text of another form.
        """
        parts = re.split(r"\s*(>=|<=|>|<)\s*", expectation.strip())
        if len(parts) != 3 or not parts[0] or not parts[2]:
            raise UserError(f"'{expectation}' is no expectation: {_FORM}.")
        left, sign, right = parts
        right, margin = _split_margin(right)
        difference = _differences(self._operand(left, expectation), self._right(right, expectation))
        satisfies = _OPERATORS[sign]
        tested = _paired(_tidy(difference - margin))
        mean = float(_tidy(difference.mean()))
        return Verdict(
            expectation=expectation,
            holds=bool(satisfies(mean, margin)),
            difference=mean,
            margin=margin,
            p=tested.p,
            p_wilcoxon=tested.p_wilcoxon,
            seeds_holding=int(satisfies(difference, margin).sum()),
            seeds=len(self.seeds),
        )

    def verdicts(self) -> list[Verdict]:
        """The verdicts on all `expectations`."""
        return [self.judge(expectation) for expectation in self.expectations]

    def to_json(self) -> str:
        """Plain JSON, the same text for the same comparison; absolute paths are cut to their last name."""
        content = {
            "slug": self.slug,
            "claims": [asdict(verdict) for verdict in self.verdicts()],
            "seeds": self.seeds,
            "arms": self.arms,
            "data": self.data,
            "config": self.config,
            "seconds": self.seconds,
            "versions": self.versions,
        }
        return json.dumps(_without_paths(_rounded(content)), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote. Raises UserError when the text is not of that form."""
        try:
            content = json.loads(text)
            content["expectations"] = [claim["expectation"] for claim in content.pop("claims")]
            return cls(**content)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(f"This is no results file ({error!r}); write one with `limbeck prove`.") from error

    def _operand(self, text: str, expectation: str) -> list[float]:
        """The values of `arm.metric`: the longest arm that fits, as both names may contain dots."""
        fitting = [arm for arm in self.arms if text.startswith(f"{arm}.")]
        if fitting:
            arm = max(fitting, key=len)
            return self.values(arm, text[len(arm) + 1 :])
        arm, dot, metric = text.rpartition(".")
        if not dot:
            raise UserError(f"'{text}' in '{expectation}' is no arm.metric: {_FORM}.")
        return self.values(arm, metric)

    def _right(self, text: str, expectation: str) -> list[float]:
        if re.fullmatch(_NUMBER, text):
            return [float(text)] * len(self.seeds)
        return self._operand(text, expectation)


def _split_margin(text: str) -> tuple[str, float]:
    found = re.fullmatch(rf"(.+?)\s+([+-])\s+({_NUMBER})", text)
    return (found[1], float(found[2] + "1") * float(found[3])) if found else (text, 0.0)


def _check_arm(arm: str, rows: Sequence[Mapping[str, float]], seeds: Sequence[int]) -> None:
    if len(rows) != len(seeds):
        raise UserError(f"The arm '{arm}' has {len(rows)} results for {len(seeds)} seeds; run it with every seed.")
    for seed, row in zip(seeds, rows, strict=True):
        if row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())
            raise UserError(f"The arm '{arm}' has the metric '{odd[0]}' for some seeds only; measure it for all.")
        for metric, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"The metric '{metric}' of arm '{arm}', seed {seed}, is {value!r}, no finite number.")


def _differences(left: Sequence[float], right: Sequence[float]) -> np.ndarray:
    return _tidy(np.subtract(left, right))


def _tidy(values: Any) -> Any:
    # 0.81 - 0.80 and 0.82 - 0.81 differ in the last bits: without rounding neither ties nor >= would be seen.
    return np.round(values, 12)


def _statistics(values: Sequence[float]) -> Statistics:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Statistics(float(np.mean(values)), deviation)


def _paired(difference: np.ndarray) -> Paired:
    mean, count = float(difference.mean()), len(difference)
    wilcoxon = _exact_wilcoxon(difference)
    if count == 1:
        return Paired(mean, None, None, None, wilcoxon)
    if np.ptp(difference) == 0:  # the t statistic is 0/0 or infinite
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0, wilcoxon)
    tested = stats.ttest_1samp(difference, 0.0)
    interval = tested.confidence_interval(0.95)
    return Paired(mean, float(interval.low), float(interval.high), float(tested.pvalue), wilcoxon)


def _exact_wilcoxon(difference: np.ndarray) -> float:
    """Two-sided signed-rank test over all 2^n signs; zeros are left out, ties get their mean rank.

    scipy's exact distribution is for differences without ties, which accuracies on a small test set do have.
    """
    nonzero = difference[difference != 0]
    doubled = np.rint(2 * stats.rankdata(np.abs(nonzero))).astype(int)  # mean ranks are halves
    ways = np.ones(1)
    for rank in doubled:
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    observed = int(doubled[nonzero > 0].sum())
    tail = min(ways[: observed + 1].sum(), ways[observed:].sum())
    return float(min(1.0, 2 * tail / ways.sum()))


def _rounded(value: Any) -> Any:
    """Every float within `value` with 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def _without_paths(value: Any) -> Any:
    if isinstance(value, str):
        kinds = (PurePosixPath(value), PureWindowsPath(value))
        return next((path.name for path in kinds if path.is_absolute()), value)
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    return [_without_paths(part) for part in value] if isinstance(value, list) else value
