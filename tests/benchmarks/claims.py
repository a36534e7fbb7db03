"""What a page says about a winner, judged over simulated sweeps whose truth is known: bias, coverage, false claims and power.

    python tests/benchmarks/claims.py [--json] [--sweeps 2000] [--seed 1] [--seeds 3] [--sizes 4 16 64] [--only TEXT ...]

Scores are in standard deviations of a seed. sweeps/report/winner.py judges them, as it does for tables and pages. The noise is normal, or
that of recorded runs (tests/benchmarks/curves.json): what configuration and seed leave of a score, drawn for each configuration from those
of a quarter of the recorded configurations in the order of their scores; the quarters' spreads differ.
"A claim is false" if the page calls a configuration the best or rules one out where another is as good, puts the best above an equal
baseline, or leaves all that are best out of those that may be. A search gives one seed to each and three to the finalists and the baseline.
"Until decided" gives those that may be the best a seed more in each round, up to ten, and judges at the look at which it stops.
Status 1 where a figure of a scenario marked "required" misses its bound. The others show what is not promised.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _report import publish
from numpy.typing import NDArray
from rich.table import Table

from sweeps.report.looks import level_at, screen
from sweeps.report.winner import Judgement, judge

Array = NDArray[np.float64]
CURVES = Path(__file__).resolve().parent / "curves.json"
MOST_BIAS, LEAST_COVERED, MOST_FALSE = 0.3, 0.94, 0.06
POWER = {4: 0.8, 16: 0.9, 64: 0.9}
_BATCH = 250  # sweeps judged at once


@dataclasses.dataclass(frozen=True)
class Scenario:
    """True scores of the configurations, and the noise of their seeds."""

    name: str
    ahead: tuple[float, ...] = ()  # scores of the first configurations, the others have 0
    effects: float = 0.0  # standard deviation of normal effects
    recorded: bool = False  # noise of recorded runs
    noisy: bool = False  # one configuration, which may lead or not, has three times the spread
    shared: float = 0.0  # standard deviation of what a seed does to all configurations
    search: bool = False
    until: tuple[int, ...] = ()  # seeds at the first and the last look
    required: bool = True


SCENARIOS = [
    Scenario("all equal"),
    Scenario("all equal, recorded noise", recorded=True),
    Scenario("all equal, one with 3 x the spread", noisy=True),
    Scenario("one 3 sd ahead", ahead=(3.0,)),
    Scenario("one 3 sd ahead, recorded noise", ahead=(3.0,), recorded=True),
    Scenario("normal effects of 1 sd", effects=1.0),
    Scenario("normal effects of 1 sd, recorded noise", effects=1.0, recorded=True),
    Scenario("normal effects of 1 sd, one with 3 x the spread", effects=1.0, noisy=True),
    Scenario("all equal, seeds differ by 2 sd", shared=2.0),
    Scenario("search, all equal", search=True, required=False),
    Scenario("search, normal effects of 1 sd", effects=1.0, search=True, required=False),
    Scenario("until decided, all equal", until=(3, 10)),
    Scenario("until decided, all equal, recorded noise", recorded=True, until=(3, 10), required=False),
    Scenario("until decided, one 1.5 sd ahead", ahead=(1.5,), until=(3, 10)),
    Scenario("two equal ones 3 sd ahead", ahead=(3.0, 3.0), required=False),
    Scenario("two equal ones 2 sd ahead", ahead=(2.0, 2.0), required=False),
]


def recorded_noise() -> Array:
    """Return (quarters, residuals) of the recorded runs at their end, with mean 0 and overall variance 1."""
    held = json.loads(CURVES.read_text())
    names = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in held["curves"]))
    ends = np.array([[list(held["curves"][f"{name} {seed}"].values())[-1] for seed in held["seeds"]] for name in names])
    left = ends - ends.mean(1, keepdims=True) - ends.mean(0) + ends.mean()
    quarters = left[np.argsort(ends.mean(1))].reshape(4, -1)
    quarters = quarters - quarters.mean(1, keepdims=True)
    return np.asarray(quarters / np.sqrt((quarters**2).mean()))


def drawn(scenario: Scenario, configurations: int, seeds: int, sweeps: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return true scores (sweeps, configurations), and scores (sweeps, configurations, seeds)."""
    truth = rng.normal(0, scenario.effects, (sweeps, configurations)) if scenario.effects else np.zeros((sweeps, configurations))
    truth[:, : len(scenario.ahead)] += scenario.ahead
    shape = (sweeps, configurations, seeds)
    if scenario.recorded:
        noise = recorded_noise()
        whose = rng.integers(0, len(noise), shape[:2])
        errors = noise[whose[..., None], rng.integers(0, noise.shape[1], shape)]
    else:
        errors = rng.normal(size=shape)
    if scenario.noisy:
        errors[np.arange(sweeps), rng.integers(0, configurations, sweeps)] *= 3
    scores = truth[..., None] + errors + scenario.shared * rng.normal(size=(sweeps, 1, seeds))
    return truth, searched(scores) if scenario.search else scores


def searched(scores: Array, finalists: int = 2) -> Array:
    """Return the scores that a search has: one seed of each, then further ones of the leaders and of the last, its baseline."""
    found = np.where(np.arange(scores.shape[2]) == 0, scores, np.nan)
    found[:, -1] = scores[:, -1]
    for _ in range(scores.shape[1] * scores.shape[2]):
        leaders = np.argsort(-np.nanmean(found, 2), 1)[:, :finalists]
        runs = (~np.isnan(found)).sum(2)
        due = [(sweep, c) for sweep, row in enumerate(leaders) for c in row if runs[sweep, c] < scores.shape[2]]
        if not due:
            break
        for sweep, c in due:
            found[sweep, c, runs[sweep, c]] = scores[sweep, c, runs[sweep, c]]
    return found


def decided(scores: Array, first: int, most: int) -> tuple[Judgement, Array]:
    """Return what is said of each sweep when it stops, and the scores that it has then: --until-decided."""
    sweeps, configurations, _ = scores.shape
    runs = np.full((sweeps, configurations), first)
    left = np.arange(sweeps)
    parts: dict[int, Any] = {}
    seen = np.full(scores.shape, np.nan)
    for seeds in range(first, most + 1):
        seen[left] = np.where(np.arange(most) < runs[left][..., None], scores[left], np.nan)
        found = judge(seen[left], True, level_at(seeds, (first, most)))
        for place, sweep in enumerate(left):
            parts[sweep] = [getattr(found, f.name)[place] for f in dataclasses.fields(Judgement)]
        may = found.against > screen((first, most))
        may[np.arange(len(left)), found.best] = True
        runs[left] += may
        left = left[~found.declared]
        if not len(left):
            break
    return Judgement(*(np.array(of_field) for of_field in zip(*(parts[i] for i in range(sweeps)), strict=True))), seen


def figures_of(scenario: Scenario, configurations: int, seeds: int, sweeps: int, seed: int) -> dict[str, Any]:
    """Return the figures of one scenario and size."""
    truth, scores = drawn(
        scenario,
        configurations,
        scenario.until[-1] if scenario.until else seeds,
        sweeps,
        np.random.default_rng([seed, configurations, SCENARIOS.index(scenario)]),
    )
    batches = [scores[i : i + _BATCH] for i in range(0, sweeps, _BATCH)]
    if scenario.until:
        both = [decided(batch, *scenario.until) for batch in batches]
        parts, scores = [judgement for judgement, _ in both], np.concatenate([seen for _, seen in both])
    else:
        parts = [judge(batch, scenario.search) for batch in batches]
    found = Judgement(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Judgement)))
    every = np.arange(sweeps)
    own = truth[every, found.best]
    others = truth.copy()
    others[every, found.best] = -np.inf
    right = own > others.max(1) + 1e-9
    as_good = others >= own[:, None] - 1e-9
    false = found.declared & ~right
    false |= (~found.candidates & ~found.declared[:, None] & as_good).any(1) | (found.better_than[:, -1] & as_good[:, -1])
    false |= ~(found.candidates & (truth >= truth.max(1, keepdims=True) - 1e-9)).any(1)
    known = ~np.isnan(found.low)
    return {
        "scenario": scenario.name,
        "required": scenario.required,
        "settings": configurations,
        "bias": round(float(np.nanmean(found.estimate - own)), 3),
        "bias_of_the_mean": round(float((np.nanmean(scores[every, found.best], 1) - own).mean()), 3),
        "covered": round(float(((found.low <= own) & (own <= found.high))[known].mean()), 4),
        "half_interval": round(float(np.nanmedian(found.high - found.low) / 2), 2),
        "false_claims": round(float(false.mean()), 4),
        "declared_right": round(float((found.declared & right).mean()), 4),
        "runs": round(float((~np.isnan(scores)).sum((1, 2)).mean()), 1),
        "candidates": round(float(found.candidates.sum(1).mean()), 1),
    }


def missed(line: dict[str, Any]) -> list[str]:
    """Return the figures of a line that miss their bounds."""
    found = [] if abs(line["bias"]) <= MOST_BIAS else ["bias"]
    found += [] if line["covered"] >= LEAST_COVERED else ["covered"]
    found += [] if line["false_claims"] <= MOST_FALSE else ["false_claims"]
    ahead = line["scenario"].startswith("one 3 sd ahead")
    return found + (["declared_right"] if ahead and line["declared_right"] < POWER.get(line["settings"], 0.0) else [])


def shown(figures: dict[str, Any]) -> tuple[Table, list[str]]:
    """Return the figures for a terminal."""
    heads = [
        "scenario",
        "settings",
        "bias",
        "of the mean",
        "covered",
        "half interval",
        "false claims",
        "declared best",
        "may be best",
        "runs",
        "misses",
    ]
    table = Table(*heads, title="Claims about winners of simulated sweeps, in standard deviations of a seed")
    for line in figures["scenarios"]:
        keys = ("bias", "bias_of_the_mean", "covered", "half_interval", "false_claims", "declared_right", "candidates", "runs")
        missing = ", ".join(line["misses"]) if line["required"] else "not required"
        table.add_row(line["scenario"], str(line["settings"]), *(f"{line[key]:g}" for key in keys), missing)
    return table, [f"required: |bias| <= {MOST_BIAS}, covered >= {LEAST_COVERED}, false claims <= {MOST_FALSE}, declared best >= {POWER}"]


def main() -> int:
    """Simulate, and print a line a scenario and size."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sweeps", type=int, default=2000, help="of each scenario and size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of each configuration")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="scenarios whose names contain one of these")
    asked = parser.parse_args()
    chosen = [s for s in SCENARIOS if any(text in s.name for text in asked.only)]
    lines = [figures_of(s, k, asked.seeds, asked.sweeps, asked.seed) for k in asked.sizes for s in chosen]
    lines = [{**line, "misses": missed(line)} for line in lines]
    figures = {"scenarios": lines, "met": not any(line["misses"] for line in lines if line["required"])}
    publish(asked.json, asked.sweeps, figures, *shown(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
