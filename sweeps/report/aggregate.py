"""Decide which runs count, and aggregate them: a row per run, a summary per configuration."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.task import score_format
from sweeps.report.looks import level_at
from sweeps.report.significance import UNTESTED, Comparison, compare
from sweeps.report.winner import BEST, Winner, winner
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

LABEL_WIDTH = 60  # characters of a configuration's name per line of a table or plot
_OF_RESULT = ("seconds", "device_hours", "images_per_second", "peak_memory_mb", "parameters", "resumes")
COSTS = (*_OF_RESULT, "pretraining_hours", "energy_kwh", "evaluation_hours")
_COST_TITLES = {
    "pretraining_hours": "pretraining, device-hours",
    "evaluation_hours": "evaluations, device-hours",
    "images_per_second": "images/s",
    "energy_kwh": "energy with probes, kWh",
    "peak_memory_mb": "peak memory, MiB",
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n numbers.

    `mean` is None without a number, `std` with fewer than two.
    """

    mean: float | None
    std: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of `values`."""
        mean = statistics.fmean(values) if values else None
        return Spread(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))

    def in_digits(self) -> str:
        """Return the spread in three significant digits, or whole numbers from 100 on.

        Use it for values that are not percentages; `str` is for those.
        """

        def rounded(value: float, digits: int) -> str:
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"

        if self.mean is None:
            return "-"
        return rounded(self.mean, 3) if self.std is None else f"{rounded(self.mean, 3)} ± {rounded(self.std, 2)}"

    def __str__(self) -> str:
        """Return '73.1 ± 0.4', '73.1' for a single value, or '-' for none."""
        if self.mean is None:
            return "-"
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class FineSpread(Spread):
    """Spread of scores that are no percentages: shown with as many digits as its standard deviation tells apart."""

    def __str__(self) -> str:
        """Return '0.0231 ± 0.0014', '0.02314' for a single value, or '-' for none."""
        if self.mean is None:
            return "-"
        if not self.std:
            return f"{self.mean:.4g}" if self.std is None else f"{self.mean:.4g} ± 0"
        places = max(1 - math.floor(math.log10(self.std)), 0)
        return f"{self.mean:.{places}f} ± {self.std:.{places}f}" if places < 7 else f"{self.mean:.4g} ± {self.std:.1e}"


def spread_of(view: View, values: Sequence[float]) -> Spread:
    """Return the spread of scores, which says how they are shown: percentages with one decimal."""
    found = Spread.of(values)
    return found if view.sweep.task.UNIT == "%" else FineSpread(found.mean, found.std, found.n)


@dataclass(frozen=True)
class Row:
    """One run: its trial, state, metrics and costs."""

    signature: str
    configuration: str  # tells configurations apart, as labels need not
    label: str
    seed: int
    state: TrialState
    cause: str
    metrics: dict[str, float]
    costs: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """One configuration over its completed seeds, with counts of the runs outside the means."""

    label: str
    spreads: dict[str, Spread]
    failed: int
    pruned: int
    unfinished: int
    parameters: int
    device_hours: float
    paper: dict[str, float]
    costs: dict[str, Spread]  # of the completed runs
    # metric -> seed -> value, of the completed runs that have one
    values: dict[str, dict[int, float]]
    damaged: int = 0
    configuration: str = ""

    @property
    def key(self) -> str:
        """Return what tells the configuration from others, as its label need not."""
        return self.configuration or self.label


def distinct(names: Sequence[str]) -> list[str]:
    """Return `names`, of which repeated ones are numbered: 'a', 'a (2)'. An axis would merge equal ones."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def costs_of(result: RunResult, batch: int | None) -> dict[str, float]:
    """Return the known costs of a run, by the names in COSTS.

    `batch` is in images per step, None if the task has none. pretraining_hours is device_hours
    without the probes' share; evaluation_hours come on top of it.
    """
    costs = {name: getattr(result, name) for name in (*_OF_RESULT, "energy_kwh")}
    if result.evaluation_hours:
        costs["evaluation_hours"] = sum(result.evaluation_hours.values())
    if result.status is RunStatus.completed and batch is not None:  # images_per_second is 0 without training
        training_seconds = result.step * batch / result.images_per_second if result.images_per_second else 0.0
        costs["pretraining_hours"] = result.device_hours * training_seconds / max(result.seconds, 1e-9)
    return {name: value for name, value in costs.items() if value is not None}


def rows(view: View) -> list[Row]:
    """Return one row per trial, in the sweep's order."""
    table = []
    for trial in view.sweep.trials:
        state, result = view.state(trial), view.result(trial)
        causes = [view.damage(trial)] if result is None else [result.cause, *(f"{p}: {c}" for p, c in result.missing.items())]
        table.append(
            Row(
                trial.signature,
                trial.configuration,
                trial.label,
                trial.seed,
                state,
                "; ".join(c for c in causes if c),
                {} if result is None else result.metrics,
                {} if result is None else costs_of(result, view.sweep.task.value(trial.values, "batch", None)),
            )
        )
    return table


def summaries(view: View, table: Sequence[Row] | None = None) -> list[Summary]:
    """Return one summary per configuration, best mean objective first, those without one last.

    `table` is what `rows` gives for the view, if that is known.
    """
    table, sweep = rows(view) if table is None else table, view.sweep
    metrics = sorted({m for row in table for m in row.metrics} | {sweep.objective, *sweep.headline})
    found = []
    by_configuration: dict[str, list[Row]] = {}
    for row in table:
        by_configuration.setdefault(row.configuration, []).append(row)
    for configuration, mine in by_configuration.items():
        label = mine[0].label
        done = [row for row in mine if row.state is TrialState.completed]
        values = {m: {row.seed: row.metrics[m] for row in done if m in row.metrics} for m in metrics}
        found.append(
            Summary(
                label,
                {m: spread_of(view, list(values[m].values())) for m in metrics},
                sum(row.state is TrialState.failed for row in mine),
                sum(row.state is TrialState.pruned for row in mine),
                sum(not row.state.ended for row in mine),
                max((int(row.costs["parameters"]) for row in done), default=0),
                sum(row.costs["device_hours"] for row in mine if row.costs),
                sweep.paper.get(label, {}),
                {c: Spread.of([row.costs[c] for row in done if c in row.costs]) for c in COSTS},
                values,
                sum(row.state is TrialState.damaged for row in mine),
                configuration,
            )
        )
    means = {s.key: s.spreads[sweep.objective].mean for s in found}
    sign = sweep.sign
    return sorted(found, key=lambda s: float("inf") if (mean := means[s.key]) is None else -sign * mean)


def images_behind(view: View, leaders: Mapping[str, "Leader | None"]) -> str:
    """Return on how many images each score rests, and the error that this gives the best; "" if unknown."""
    said = []
    results = [found for t in view.sweep.trials if (found := view.result(t)) is not None and found.status is RunStatus.completed]
    for metric, lead in leaders.items():
        counts = sorted({r.images[metric] for r in results if metric in r.images})
        if not counts or lead is None:
            continue
        error = view.sweep.task.sampling_error(lead.best.spreads[metric].mean or 0.0, counts[0])
        many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        said.append(f"{title(view, metric)} {many}" + ("" if error is None else f" (± {error:{score_format(view.sweep.task.UNIT, 1)}})"))
    lead_in = "images behind a score, and the standard error that their choice gives the best, which no test over seeds covers"
    return f"{lead_in}: {', '.join(said)}" if said else ""


def references(view: View) -> dict[str, dict[str, Spread]]:
    """Return name -> metric -> spread over seeds, of what scores are compared with, best first; chance level for example.

    Where configurations differ in a reference, as they do with other encoders, each name says whose
    it is.
    """
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}  # name -> configuration -> seed -> scores
    for trial in view.sweep.trials:
        result = view.result(trial)
        for name, scores in result.references.items() if result is not None and result.status is RunStatus.completed else ():
            found.setdefault(name, {}).setdefault(trial.configuration, {})[trial.seed] = scores
    table: dict[str, dict[str, Spread]] = {}
    labels = {t.configuration: t.label for t in view.sweep.trials}
    for name, by_configuration in found.items():
        apart: list[tuple[str, dict[int, dict[str, float]]]] = []
        for configuration, seeds in by_configuration.items():
            for _, others in apart:
                if all(others.get(seed, {}).get(m, value) == value for seed, scores in seeds.items() for m, value in scores.items()):
                    for seed, scores in seeds.items():
                        others[seed] = {**others.get(seed, {}), **scores}
                    break
            else:
                apart.append((labels[configuration], dict(seeds)))
        for label, seeds in zip(distinct([label for label, _ in apart]), [seeds for _, seeds in apart], strict=True):
            metrics = dict.fromkeys(metric for scores in seeds.values() for metric in scores)
            values = {m: [scores[m] for scores in seeds.values() if m in scores] for m in metrics}
            # What is the same with every seed, as chance level is, has no spread.
            table[name if len(apart) == 1 else f"{name} ({label})"] = {
                m: Spread.of(v if len(set(v)) > 1 else v[:1]) for m, v in values.items()
            }
    sign, objective = view.sweep.sign, view.sweep.objective
    return dict(sorted(table.items(), key=lambda found: -sign * (found[1].get(objective, Spread.of([])).mean or 0.0)))


def shown_configurations(view: View, table: Sequence[Summary] | None = None) -> tuple[list[Summary], str]:
    """Return the configurations to show people, and a line about those left out. `table` is what `summaries` gives, if known.

    Those whose runs were all pruned are left out, unless that holds for every configuration.
    """
    table = list(summaries(view) if table is None else table)
    shown = [
        s for s in table if not s.pruned or s.failed or s.unfinished or s.damaged or any(spread.n for spread in s.spreads.values())
    ] or table
    left_out = len(table) - len(shown)
    return shown, f"{left_out} configurations were pruned and are not shown; see summary.csv" if left_out else ""


def columns(view: View) -> list[str]:
    """Return the metrics that a table shows: the objective, then the headline."""
    return list(dict.fromkeys([view.sweep.objective, *view.sweep.headline]))


def title(view: View, metric: str) -> str:
    """Return a metric's title, as its task gives it, or a cost's name and unit."""
    return _COST_TITLES.get(metric, metric) if metric in COSTS else view.sweep.task.title(metric)


def in_units(view: View, text: object, form: str = "{} {}") -> str:
    """Return a score, or other text in its place, with the task's unit of scores."""
    return form.format(text, view.sweep.task.UNIT) if view.sweep.task.UNIT else str(text)


@dataclass(frozen=True)
class Leader:
    """The configuration with the best mean of a metric, and what may be said of it."""

    metric: str
    best: Summary
    other: Summary | None
    comparison: Comparison | None  # with the next alone; None if there is no other configuration
    winner: Winner
    level: float = BEST  # of p at which it is called the best

    @property
    def significant(self) -> bool:
        """Return whether it may be called the best, judged among all configurations."""
        return self.winner.declared


def leader(table: Sequence[Summary], metric: str, sign: float = 1.0, adaptive: bool = False, until: Sequence[int] = ()) -> Leader | None:
    """Return the configuration with the best mean of `metric`, the first of equals, or None; with sign -1 the lowest is best.

    `adaptive` says that the runs decided which configurations got further seeds, as in a search.
    `until` is the sweep's: [first, most] seeds, after each of which it is looked at.
    """
    ranked = sorted((s for s in table if s.values.get(metric)), key=lambda s: -sign * statistics.fmean(s.values[metric].values()))
    if not ranked:
        return None
    best, *others = ranked
    level = level_at(max(len(s.values[metric]) for s in ranked), until)
    found = winner({s.key: s.values[metric] for s in ranked}, sign, adaptive, level)
    other = others[0] if others else None
    return Leader(metric, best, other, compare(best.values[metric], other.values[metric]) if other else None, found, level)


def leader_of(view: View, table: Sequence[Summary], metric: str) -> Leader | None:
    """Return the leader by `metric` among `table`, in the direction of the view's task."""
    sign = view.sweep.sign if metric == view.sweep.objective else view.sweep.task.sign(metric)
    return leader(table, metric, sign, view.sweep.search is not None or bool(view.sweep.until), view.sweep.until)


def leaders_of(view: View, table: Sequence[Summary]) -> dict[str, Leader | None]:
    """Return column -> leader. The columns are tested in order: where one has no best, neither have those after it.

    So all columns share the error rate of one.
    """
    found: dict[str, Leader | None] = {}
    may = True
    for metric in columns(view):
        lead = leader_of(view, table, metric)
        if lead is not None and not may:
            lead = replace(lead, winner=replace(lead.winner, declared=False))
        found[metric] = lead
        may = may and lead is not None and lead.significant
    return found


def judged(lead: Leader) -> str:
    """Return 'difference 1.3 (95 % interval 0.4 to 2.2: paired t over 3 seeds); among all 11 configurations p = 0.01'."""
    assert lead.comparison is not None
    p = lead.winner.p
    among = f"among all {1 + len(lead.winner.against)} configurations p {'< 0.001' if (p or 0) < 0.001 else f'= {p:.2g}'}"
    said = "no test, which needs two runs of the best, and runs that differ" if p is None else among
    return f"{apart(lead, lead.comparison)}; {said}"


def apart(lead: Leader, pair: Comparison) -> str:
    """Return 'difference 1.3 (95 % interval of the pair alone 0.4 to 2.2: paired t over 3 seeds)' of the best and another one."""
    form, how = form_of(lead), "" if pair.test == UNTESTED else pair.how
    bounds = None if pair.low is None or pair.high is None else f"{pair.low:{form}} to {pair.high:{form}}"
    interval = "" if bounds is None else f"95 % interval of the pair alone {bounds}: "
    return f"difference {pair.difference:{form}}" + (f" ({interval}{how})" if how else "")


def against_the_baseline(view: View, table: Sequence[Summary], lead: Leader) -> list[str]:
    """Return a comparison of the best with the baseline: a search's configuration without changes, else the sweep's first."""
    first = view.sweep.trials[0]
    called = "configuration without changes" if view.sweep.search is not None else f"first configuration, {first.label},"
    base = next((s for s in table if s.key == first.configuration and s.values.get(lead.metric)), None)
    if base is None:
        return [f"The {called} has no completed run to compare the best with."]
    if base.key == lead.best.key:
        return [f"The best is the {called.rstrip(',')}."]
    word = "significantly better" if base.key in lead.winner.better_than else "tied with it"
    spread, pair = base.spreads[lead.metric], compare(lead.best.values[lead.metric], base.values[lead.metric])
    return [f"The {called} has {spread} (n = {spread.n}); the best is {word}, judged among all: {apart(lead, pair)}."]


def may_be_best(lead: Leader) -> str:
    """Return '4 of 11 configurations may be the best (95 % confidence)'."""
    may, every = len(lead.winner.candidates), 1 + len(lead.winner.against)
    return f"{may} of {every} configurations may be the best (95 % confidence)"


def form_of(lead: Leader) -> str:
    """Return the format of a difference of its metric."""
    return ".3g" if isinstance(lead.best.spreads.get(lead.metric), FineSpread) else ".1f"


def run_set(view: View, table: Sequence[Row] | None = None) -> str:
    """Return which runs a table's means cover, and how many were left out for which reason. `table` is what `rows` gives, if known."""
    table = rows(view) if table is None else table
    seeds = sorted({r.seed for r in table})
    done = [r for r in table if r.state is TrialState.completed]
    configurations = len({r.configuration for r in done})
    named = ", ".join(map(str, seeds)) if len(seeds) < 7 else f"{seeds[0]} to {seeds[-1]}"
    line = f"run set: all {len(done)} completed runs, of {configurations} configurations and seeds {named}"
    left = [(sum(r.state is s for r in table), s.name) for s in (TrialState.failed, TrialState.pruned, TrialState.damaged)]
    left.append((sum(not r.state.ended for r in table), "not ended"))
    line += "; left out: " + ", ".join(f"{n} {what}" for n, what in left if n) if any(n for n, _ in left) else ""
    missing = {m: sum(m not in r.metrics for r in done) for m in columns(view)}
    without = ", ".join(f"{title(view, m)} of {n}" for m, n in missing.items() if n)
    return line + (f"; probes without a value: {without}" if without else "")
