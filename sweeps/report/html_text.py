"""Write the text of a report: the answer and its uncertainty, costs, failures, provenance."""

import collections
import re
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import read_json, reading, tail
from cnnjepa.run.typed import build
from jobs.task import score_format
from sweeps.report.aggregate import (
    Spread,
    against_the_baseline,
    in_units,
    judged,
    leader_of,
    may_be_best,
    rows,
    summaries,
    title,
    without_luck,
)
from sweeps.report.chance import chance_lines
from sweeps.search.search import trials_to_begin
from sweeps.search.warnings import warnings_of
from sweeps.spec.sweep import Trial
from sweeps.state.damage import cause_of
from sweeps.state.history import commands, in_words
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOG_BYTES, _LOG_LINES = 20_000, 14
_SHAPES = 8  # kinds of run listed on a page


def hours_unit(view: View) -> str:
    """Return 'GPU-hours' if any run held or measured a GPU, else 'core-hours'."""
    held = any(c.slurm and c.slurm.gpus for t in view.sweep.trials for c in view.claims(t))
    read = any((r := view.result(t)) is not None and r.energy_kwh is not None for t in view.sweep.trials)
    return "GPU-hours" if held or read else "core-hours"


def format_hours(hours: float) -> str:
    """Return hours in three digits, or whole numbers from 100 on."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def hours_of_a_run(view: View) -> dict[str, Spread]:
    """Return configuration -> hours of its completed runs."""
    found: dict[str, list[float]] = {t.configuration: [] for t in view.sweep.trials}
    for trial in view.sweep.trials:
        if view.state(trial) is TrialState.completed:
            found[trial.configuration].append(view.device_hours(trial))
    return {configuration: Spread.of(hours) for configuration, hours in found.items()}


def to_end(view: View) -> int:
    """Return the number of unfinished runs, including those that a search may still begin."""
    return sum(not s.ended for s in view.states().values()) + trials_to_begin(view)


def called(label: str) -> str:
    """Return the short name of a configuration; in a search, its number."""
    if label.startswith("#"):
        return label.partition(" ")[0]
    return "baseline" if label.startswith("baseline: ") else label


def answer(view: View) -> tuple[str, bool]:
    """Return a one-sentence answer with its uncertainty, and whether it is significant."""
    lead = leader_of(view, summaries(view), view.sweep.objective)
    if lead is None:
        return "No run has completed yet.", False
    left = to_end(view)
    so_far = f"So far, with {left} of {left + sum(s.ended for s in view.states().values())} runs pending: " if left else ""
    spread, metric = lead.best.spreads[lead.metric], title(view, lead.metric)
    best = f"{called(lead.best.label)} with {in_units(view, spread)} {metric} (n = {spread.n})"
    if lead.other is None:
        return f"{so_far}{best}; there is nothing to compare it with.", False
    other = lead.other.spreads[lead.metric]
    follows = f"{called(lead.other.label)} with {other} (n = {other.n}), {judged(lead)}"
    if lead.significant:
        return f"{so_far}the best is {best}, significantly better than all others; the next is {follows}.", True
    return f"{so_far}no configuration is significantly better than all others: {best} leads, followed by {follows}.", False


def beside_the_answer(view: View) -> list[str]:
    """Return the lines that keep a reader from overrating the answer."""
    table = summaries(view)
    lead = leader_of(view, table, view.sweep.objective)
    lines = []
    if lead is not None and lead.other is not None:
        lines += [f"{found[0].upper()}{found[1:]}." for found in [without_luck(view, lead), may_be_best(lead)] if found]
    if view.sweep.search is not None and lead is not None:
        lines += [s.label for s in (lead.best, lead.other) if s is not None]
    lines += against_the_baseline(view, table, lead) if lead is not None else []
    if lead is not None and view.sweep.task.RANKED:
        lines.append(view.sweep.task.RANKED)
    lines += [f"{line[0].upper()}{line[1:]}." for line in chance_lines(view)]
    if view.sweep.scale.name == "smoke":
        lines.append("Smoke scale: it shows that everything works, and says little about the question.")
    return lines


def tiles(view: View) -> list[tuple[str, str]]:
    """Return (number, label) pairs for readers with ten seconds."""
    lead, unit = leader_of(view, summaries(view), view.sweep.objective), hours_unit(view)
    found: list[tuple[str, str]] = []
    if lead is not None:
        spread = lead.best.spreads[lead.metric]
        found.append((called(lead.best.label), "best, statistically significant" if lead.significant else "leads, tied with the next"))
        found.append((in_units(view, spread), f"{title(view, lead.metric)}, n = {spread.n}"))
    states = collections.Counter(s.name for s in view.states().values())
    found.append((f"{format_hours(total_hours(view))} {unit}", "cost of all runs"))
    ended = ", ".join(f"{n} {name}" for name, n in states.items())
    found.append((f"{states['completed']} of {sum(states.values()) + trials_to_begin(view)}", f"runs completed ({ended})"))
    return found


def total_hours(view: View) -> float:
    """Return the hours of all ended runs."""
    return sum(view.device_hours(t) for t in view.sweep.trials)


def costs(view: View) -> list[str]:
    """Return lines about hours: in total, by state, and per run."""
    unit = hours_unit(view)
    by_state: dict[str, float] = collections.defaultdict(float)
    for trial in view.sweep.trials:
        by_state[view.state(trial).name] += view.device_hours(trial)
    shares = ", ".join(f"{format_hours(h)} {name}" for name, h in by_state.items() if h)
    lines = [f"{format_hours(total_hours(view))} {unit} in all: {shares}"]
    of_a_run = [h for s in hours_of_a_run(view).values() for h in [s.mean] if h is not None]
    if of_a_run:
        lines.append(f"a completed run took {format_hours(statistics.median(of_a_run))} {unit}, median over configurations of their means")
    again = [len(view.claims(t)) - 1 for t in view.sweep.trials if len(view.claims(t)) > 1]
    lines.append(f"{len(again)} runs were started more than once ({sum(again)} further starts in all) and resumed from their checkpoints")
    kwh = [r.energy_kwh for t in view.sweep.trials if (r := view.result(t)) is not None and r.energy_kwh is not None]
    return [*lines, f"{sum(kwh):,.1f} kWh drawn by the GPUs of {len(kwh)} runs"] if kwh else lines


def about(view: View, trial: Trial, unit: str) -> list[str]:
    """Return the details of a selected trial, with its cost in `unit`."""
    result, folder = view.result(trial), view.sweep.trial_dir(trial)
    lines = [f"{view.state(trial).name}; trials/{trial.signature}"]
    lines += [damage] if (damage := view.damage(trial)) else []
    if result is not None:
        lines += [f"cause: {result.cause}"] if result.cause else []
        lines += [f"{probe} has no value: {cause}" for probe, cause in result.missing.items()]
        lines += [f"{title(view, m)}: {v:{score_format(view.sweep.task.UNIT)}}" for m, v in result.metrics.items()]
        hours = f"{format_hours(view.device_hours(trial))} {unit}"
        lines.append(f"{result.step} steps, {hours}, {result.images_per_second:.0f} images/s, peak memory {result.peak_memory_mb:.0f} MiB")
    lines += [f"warning: {warning.line}" for warning in warnings_of(view, trial)]
    past = view.claims(trial)
    where = [f"job {c.slurm.job} on {c.slurm.node}" if c.slurm else c.owner.host for c in past]
    lines += [f"started {len(past)} times: " + ", ".join(dict.fromkeys(where))] if past else []
    try:
        found = provenance_of(folder)
    except ValueError as error:
        return [*lines, cause_of(error, folder)]
    return lines + ([f"commit {found.commit[:12] or 'unknown'}{', with changes' if found.diff else ''}"] if found else [])


@dataclass(frozen=True)
class Provenance:
    """What the report shows of a run's provenance.json."""

    commit: str
    diff: str
    packages: dict[str, str]
    python: str
    host: str


def provenance_of(folder: Path) -> Provenance | None:
    """Return the content of provenance.json, or None without one; raise DamagedError."""
    path = folder / "provenance.json"
    if not path.exists():
        return None
    with reading(path):
        values = read_json(path)
        return build(Provenance, {f.name: values[f.name] for f in fields(Provenance)})


def provenances(view: View) -> tuple[list[Provenance], list[str]]:
    """Return the provenance of all runs that have one, and a line for each that cannot be read."""
    found, damaged = [], []
    for trial in view.sweep.trials:
        folder = view.sweep.trial_dir(trial)
        try:
            found += [known for known in [provenance_of(folder)] if known is not None]
        except ValueError as error:
            damaged.append(f"{trial.label}, seed {trial.seed}: {cause_of(error, folder)}")
    return found, damaged


def last_lines(view: View, trial: Trial) -> str:
    """Return the end of the trial's output, or ""."""
    past, own = view.claims(trial), newest(view.sweep.trial_dir(trial) / "log" / "train.log")
    of_job = [c.slurm.output(view.sweep.path) for c in past[-1:] if c.slurm and not c.slurm.shared]
    for path in [own, *of_job]:
        try:
            lines = tail(path, _LOG_BYTES).decode(errors="replace").splitlines()
        except OSError:
            continue
        if any(line.strip() for line in lines):
            return "\n".join(lines[-_LOG_LINES:])
    return ""


@dataclass(frozen=True)
class Failure:
    """Trials that failed alike, and the end of the first one's log."""

    cause: str
    trials: list[Trial]
    log: str


def failures(view: View) -> list[Failure]:
    """Group failed and damaged runs, and completed ones with a missing probe value, by cause.

    Causes that differ only in numbers are one group. The largest group comes first.
    """
    groups: dict[str, list[tuple[Trial, str]]] = {}
    by = {row.signature: row for row in rows(view)}
    for trial in view.sweep.trials:
        row = by[trial.signature]
        if row.cause and row.state in (TrialState.failed, TrialState.completed, TrialState.damaged):
            groups.setdefault(re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", row.cause), []).append((trial, row.cause))
    ranked = sorted(groups.values(), key=lambda found: -len(found))
    return [Failure(found[0][1], [t for t, _ in found], last_lines(view, found[0][0])) for found in ranked]


def what_was_run(view: View) -> list[str]:
    """Return the commands, commits and versions. If runs differ, count the runs of each."""
    sweep = view.sweep
    lines = []
    for found in commands(sweep.path):
        lines.append(f"{found['time']}: {in_words(found['command'])}")
    known, damaged = provenances(view)
    lines += damaged
    commits = collections.Counter(f"commit {p.commit[:12] or 'unknown'}{' with uncommitted changes' * bool(p.diff)}" for p in known)
    packages = collections.Counter(f"Python {p.python}, " + ", ".join(f"{n} {v}" for n, v in p.packages.items()) for p in known)
    hosts = collections.Counter(f"host {p.host}" for p in known)
    for counted in (commits, packages, hosts):
        several = len(counted) > 1
        lines += [f"{what}: {n} runs" if several else what for what, n in counted.most_common(8)]
    if len(commits) > 1:
        lines.append("the runs come from several commits, which may explain differences between them")
    shapes = collections.Counter(sweep.task.summary(t.values) for t in sweep.trials)
    lines += [f"{shape}: {n} runs" if len(shapes) > 1 else shape for shape, n in shapes.most_common(_SHAPES)]
    return lines + ([f"and {len(shapes) - _SHAPES} more, each in the config.yaml of its runs"] if len(shapes) > _SHAPES else [])
