"""Write the text of a report: the answer and its uncertainty, costs, failures, provenance."""

import collections
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import read_json, reading, tail
from cnnjepa.run.typed import build
from jobs.task import score_format
from sweeps.report.aggregate import Leader, Spread, against_the_baseline, judged, may_be_best, title
from sweeps.report.best import how_estimated, looks_line, parts_of_best
from sweeps.report.chance import chance_lines
from sweeps.report.seen import Seen
from sweeps.search.search import trials_to_begin
from sweeps.search.warnings import warnings_of
from sweeps.spec.sweep import Trial
from sweeps.state.damage import cause_of
from sweeps.state.history import commands, in_words
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOG_BYTES, _LOG_LINES = 20_000, 14  # of one run
_LOGS_BYTES, _FEWEST_LOG_BYTES = 600_000, 400  # of all runs of a page together, and of one
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
    return _of_completed(view, view.device_hours)


def wall_clock_of_a_run(view: View) -> dict[str, Spread]:
    """Return configuration -> seconds that its completed runs took by the clock, starts that were lost not counted."""
    return _of_completed(view, lambda trial: found.seconds if (found := view.result(trial)) is not None else 0.0)


def _of_completed(view: View, cost: Callable[[Trial], float]) -> dict[str, Spread]:
    found: dict[str, list[float]] = {t.configuration: [] for t in view.sweep.trials}
    for trial in view.sweep.trials:
        if view.state(trial) is TrialState.completed:
            found[trial.configuration].append(cost(trial))
    return {configuration: Spread.of(costs) for configuration, costs in found.items()}


def to_end(view: View) -> int:
    """Return the number of unfinished runs, including those that a search may still begin."""
    return sum(not s.ended for s in view.states().values()) + trials_to_begin(view)


def called(label: str) -> str:
    """Return the short name of a configuration; in a search, its number."""
    if label.startswith("#"):
        return label.partition(" ")[0]
    return "baseline" if label.startswith("baseline: ") else label


def answer(view: View, seen: Seen | None = None) -> tuple[str, bool]:
    """Return a one-sentence answer with its uncertainty, and whether it is significant."""
    lead = (seen or Seen(view)).lead
    left = to_end(view)
    if lead is None:
        ended = collections.Counter(s.name for s in view.states().values() if s.ended)
        said = ", ".join(f"{n} {name}" for name, n in ended.items())
        return (f"No run has completed: {said}." if said and not left else "No run has completed yet."), False
    so_far = f"So far, with {left} of {left + sum(s.ended for s in view.states().values())} runs pending: " if left else ""
    number, beside = parts_of_best(view, lead)
    best = f"{called(lead.best.label)} with {number} {title(view, lead.metric)} ({beside})"
    if lead.other is None:
        return f"{so_far}{best}; there is nothing to compare it with.", False
    other = lead.other.spreads[lead.metric]
    follows = f"{called(lead.other.label)} with {other} (n = {other.n}), {judged(lead)}"
    if lead.significant:
        return f"{so_far}the best is {best}, significantly better than all others; the next is {follows}.", True
    return f"{so_far}no configuration is significantly better than all others: {best} leads, followed by {follows}.", False


def beside_the_answer(view: View, seen: Seen | None = None) -> list[str]:
    """Return the lines that keep a reader from overrating the answer."""
    seen = seen or Seen(view)
    table, lead = seen.table, seen.lead
    lines = []
    if lead is not None and lead.other is not None:
        looks = looks_line(view, lead)
        lines += [
            line for line in [how_estimated(lead), f"{looks[0].upper()}{looks[1:]}." if looks else "", f"{may_be_best(lead)}."] if line
        ]
    if view.sweep.search is not None and lead is not None:
        lines += [s.label for s in (lead.best, lead.other) if s is not None]
    lines += against_the_baseline(view, table, lead) if lead is not None else []
    if lead is not None and view.sweep.task.RANKED:
        lines.append(view.sweep.task.RANKED)
    lines += [f"{line[0].upper()}{line[1:]}." for line in chance_lines(view, seen.shown[0])]
    if view.sweep.scale.name == "smoke":
        lines.append("Smoke scale: it shows that everything works, and says little about the question.")
    return lines


def tiles(view: View, seen: Seen | None = None) -> list[tuple[str, str]]:
    """Return (number, label) pairs for readers with ten seconds."""
    lead, unit = (seen or Seen(view)).lead, hours_unit(view)
    found: list[tuple[str, str]] = []
    if lead is not None:
        number, beside = parts_of_best(view, lead)
        found.append((called(lead.best.label), _standing(lead)))
        found.append((number, f"{title(view, lead.metric)}, {beside}"))
    states = collections.Counter(s.name for s in view.states().values())
    span = wall_clock(view)
    found.append((f"{format_hours(total_hours(view))} {unit}", "cost of all runs" + (f", in {span} of wall-clock time" if span else "")))
    others = ", ".join(f"{n} {name}" for name, n in states.items() if name != "completed")
    found.append(
        (f"{states['completed']} of {sum(states.values()) + trials_to_begin(view)}", "runs completed" + (f" ({others})" if others else ""))
    )
    return found


def _standing(lead: Leader) -> str:
    """Return what is said of the leader in a tile."""
    if lead.other is None:
        return "has nothing to be compared with"
    return "best, statistically significant" if lead.significant else "leads, tied with the next"


def wall_clock(view: View) -> str:
    """Return '2 h 10 min', from the first start of a run to the last end, or "" if no start is recorded."""
    begun = [past[0].time for t in view.sweep.trials if (past := view.claims(t))]
    ended = [view.sweep.run(t).ended_at() for t in view.sweep.trials if view.result(t) is not None]
    if not begun or not ended or max(ended) <= min(begun):
        return ""
    return in_time(max(ended) - min(begun))


def in_time(seconds: float) -> str:
    """Return '3 d 4 h', '2 h 10 min', '12 min' or '40 s'."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


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
    took = hours_of_a_run(view)
    of_a_run, clock = ([h for s in found.values() for h in [s.mean] if h is not None] for found in (took, wall_clock_of_a_run(view)))
    if of_a_run:
        beside = f" and {in_time(statistics.median(clock))} of wall-clock time" if any(clock) else ""
        lines.append(
            f"a completed run took {format_hours(statistics.median(of_a_run))} {unit}{beside}, medians over configurations of their means"
        )
    if span := wall_clock(view):
        lines.append(f"{span} of wall-clock time from the first start of a run to the last end")
    again = [len(view.claims(t)) - 1 for t in view.sweep.trials if len(view.claims(t)) > 1]
    if again:
        lines.append(
            f"{len(again)} runs were started more than once ({sum(again)} further starts in all) and resumed from their checkpoints"
        )
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
        parts = [f"{result.step:,} steps" if result.step else "", f"{format_hours(view.device_hours(trial))} {unit}"]
        parts += [f"{in_time(result.seconds)} of wall-clock time" if result.seconds else ""]
        parts += [f"{result.images_per_second:,.0f} images/s" if result.images_per_second else ""]
        parts += [f"peak memory {result.peak_memory_mb:,.0f} MiB" if result.peak_memory_mb else ""]
        lines.append(", ".join(filter(None, parts)))
    lines += [f"warning: {warning.line}" for warning in warnings_of(view, trial)]
    past = view.claims(trial)
    where = [f"job {c.slurm.job} on {c.slurm.node}" if c.slurm else c.owner.host for c in past]
    times = f"started {len(past)} times" if len(past) > 1 else "started once"
    lines += [f"{times}: " + ", ".join(dict.fromkeys(where))] if past else []
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
            damaged.append(f"{trial.name}: {cause_of(error, folder)}")
    return found, damaged


def last_lines(view: View, trial: Trial, most_bytes: int = _LOG_BYTES) -> str:
    """Return the last lines of the trial's output, in at most `most_bytes` bytes, or ""."""
    past, own = view.claims(trial), newest(view.sweep.trial_dir(trial) / "log" / "train.log")
    of_job = [c.slurm.output(view.sweep.path) for c in past[-1:] if c.slurm and not c.slurm.shared]
    for path in [own, *of_job]:
        try:
            lines = tail(path, most_bytes).decode(errors="replace").splitlines()
        except OSError:
            continue
        if any(line.strip() for line in lines):
            return "\n".join(lines[-_LOG_LINES:])
    return ""


def logs_of(view: View) -> dict[str, str]:
    """Return run ID -> the last lines of its output, of all runs that have any, in at most _LOGS_BYTES together.

    Each run has the same share, which is at least _FEWEST_LOG_BYTES; the runs of a sweep too large for that are left
    out from its end, and the page says of each trial that has no log where the log is.
    """
    share = min(max(_LOGS_BYTES // max(len(view.sweep.trials), 1), _FEWEST_LOG_BYTES), _LOG_BYTES)
    found, left = {}, _LOGS_BYTES
    # Those that failed come first: their logs are asked for.
    for trial in sorted(view.sweep.trials, key=lambda t: view.state(t) is not TrialState.failed):
        if left < share:
            break
        if text := last_lines(view, trial, share):
            found[trial.signature] = text
            left -= len(text.encode())
    return found


@dataclass(frozen=True)
class Failure:
    """Trials that failed alike, and the end of the first one's log."""

    cause: str
    trials: list[Trial]
    log: str


def failures(view: View, seen: Seen | None = None) -> list[Failure]:
    """Group failed and damaged runs, and completed ones with a missing probe value, by cause.

    Causes that differ only in numbers are one group. The largest group comes first.
    """
    groups: dict[str, list[tuple[Trial, str]]] = {}
    by = {row.signature: row for row in (seen or Seen(view)).rows}
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
