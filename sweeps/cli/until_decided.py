"""--until-decided N: add seeds to the configurations that may be the best until one is, or each has N seeds.

Each round adds one seed to each of them. Then all are judged again, at the level that
sweeps/report/looks.py gives that look. What a page claims holds whenever the sweep stops.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cnnjepa.run.identity import signature, to_dict
from jobs.cluster import ClusterProfile
from sweeps.report.aggregate import Leader, Summary, leader_of, summaries
from sweeps.report.looks import level_at, screen
from sweeps.search.search import FINALISTS, is_over
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View


def planned(path: Path, trials: Sequence[Trial], seeds: int, most: int | None) -> tuple[list[int], list[Trial], int]:
    """Return the sweep's `until`, its further trials that the folder already has, and the seeds of a search.

    `seeds` and `most` are what the command line asks for. Raise ValueError if `most` is not above
    the seeds, or not what the sweep began with.
    """
    old = Sweep.load(path) if (path / "sweep.json").exists() else None
    until = list(old.until) if old else []
    if most is not None:
        if until and most != until[1]:
            rule = "stay as the sweep began, since what a look may claim depends on it"
            raise ValueError(f"--until-decided must {rule}; got {most}, and it was {until[1]}: give {until[1]}, or another --name")
        if not until and most <= seeds:
            raise ValueError(f"--until-decided must be above the {seeds} seeds that each configuration gets at first; got {most}")
        until = until or [seeds, most]
    if not until or old is None:
        return until, [], seeds
    if old.search is not None:
        return until, [], max(seeds, min(old.search.seeds, until[1]))
    known, alike = {t.signature for t in trials}, {t.configuration for t in trials}
    return until, [t for t in old.trials if t.signature not in known and t.configuration in alike], seeds


def next_round(sweep: Sweep, asked: argparse.Namespace, cluster: ClusterProfile, console: Console) -> Sweep | None:
    """Return the sweep with a further seed for each configuration that may be the best, or None if it is over.

    It is over, too, if no further seeds were asked for. Says why, and how many runs are expected.
    """
    view = View.here(sweep)
    if asked.until_decided is None or not is_over(view) or not all(s.ended for s in view.states().values()):
        return None
    table = summaries(view)
    lead = leader_of(view, table, sweep.objective)
    if lead is None or lead.other is None:
        return None
    again = f"after {lead.best.spreads[sweep.objective].n} seeds"
    if lead.significant:
        console.print(f"decided {again}: {lead.best.label} is the best (p = {lead.winner.p:.2g})", highlight=False, soft_wrap=True)
        return None
    tied = _tied(sweep, table, lead)
    more = _of_search(sweep, tied) if sweep.search is not None else _of_grid(sweep, tied)
    if more is None:
        console.print(f"not decided {again}, and no further seed is left to add", highlight=False, soft_wrap=True)
        return None
    if refused := _above_the_cap(view, len(tied), asked, cluster):
        console.print(f"not decided {again}: {refused}", highlight=False, soft_wrap=True)
        return None
    now, most = _expected(sweep, tied, lead)
    line = f"not decided {again}: {len(tied)} configurations get a further seed; about {now} further runs are expected, at most {most}"
    console.print(line, highlight=False, soft_wrap=True)
    return more


def first_line(sweep: Sweep) -> str:
    """Return what --until-decided will do, before scores are known."""
    first, most = sweep.until
    count = FINALISTS + 1 if sweep.search is not None else len({t.configuration for t in sweep.trials})
    # A guess, since no score is known: one configuration leads all others by two standard deviations.
    enough = next((n for n in range(first, most) if _is_told_apart(2.0, 1.0, n, sweep.until)), most)
    guess = f"about {count * (enough - first)} further runs if one leads all by 2 standard deviations of a seed"
    further = f"{guess}, at most {count * (most - first)}; after {first} seeds it is said by the scores"
    return f"until decided: after {first} seeds, those that may be the best get further ones, up to {most}: {further}"


def _tied(sweep: Sweep, table: Sequence[Summary], lead: Leader) -> list[Summary]:
    """Return the configurations that may be the best; the others get no further seed."""
    scored = [s for s in table if s.values.get(sweep.objective)]
    if sweep.search is not None:
        ranked = sorted(scored, key=lambda s: -sweep.sign * statistics.fmean(s.values[sweep.objective].values()))
        first = sweep.trials[0].configuration
        return [s for place, s in enumerate(ranked) if place < FINALISTS or s.key == first]
    return [s for s in scored if s.key == lead.best.key or lead.winner.against.get(s.key, 0.0) > screen(sweep.until)]


def _of_grid(sweep: Sweep, tied: Sequence[Summary]) -> Sweep | None:
    """Return the sweep with a trial more of each, those with fewest seeds first; None if all have the most."""
    found = []
    for summary in tied:
        own = [t for t in sweep.trials if t.configuration == summary.key]
        last = max(own, key=lambda t: t.seed)
        if len(own) < sweep.until[1]:
            config = replace(last.config, seed=last.seed + 1)
            overrides = [*(o for o in last.overrides if not o.startswith("seed=")), f"seed={last.seed + 1}"]
            found.append(replace(last, seed=last.seed + 1, values=to_dict(config), signature=signature(config), overrides=overrides))
    # `replace` copies what is cached of the trial's configuration.
    fresh = [Trial.from_dict(t.to_dict()) for t in found]
    return sweep.with_trials([*sweep.trials, *fresh]) if fresh else None


def _of_search(sweep: Sweep, tied: Sequence[Summary]) -> Sweep | None:
    """Return the search with a seed more for its finalists; None if they have the most, or could not get what they may have."""
    assert sweep.search is not None
    seeds = sweep.search.seeds
    held = max(sum(t.configuration == s.key for t in sweep.trials) for s in tied)
    return sweep.with_seeds(seeds + 1) if held >= seeds and seeds < sweep.until[1] else None


def _expected(sweep: Sweep, tied: Sequence[Summary], lead: Leader) -> tuple[int, int]:
    """Return the further runs that are expected if means and spreads stay as they are, and the most."""
    metric, most = sweep.objective, sweep.until[1]
    spreads = [s.spreads[metric].std for s in tied]
    known = [s for s in spreads if s]
    spread = math.sqrt(statistics.fmean(s**2 for s in known)) if known else 0.0
    top = statistics.fmean(lead.best.values[metric].values())
    needed = {}
    for summary in tied:
        seeds = len(summary.values[metric])
        gap = abs(top - statistics.fmean(summary.values[metric].values()))
        if summary.key != lead.best.key:
            needed[summary.key] = next((n for n in range(seeds + 1, most) if _is_told_apart(gap, spread, n, sweep.until)), most) - seeds
    own = max(needed.values(), default=0)
    return sum(needed.values()) + own, sum(most - len(s.values[metric]) for s in tied)


def _is_told_apart(gap: float, spread: float, seeds: int, until: Sequence[int]) -> bool:
    from scipy.special import ndtri  # scipy.stats would take 1 s and 60 MB

    return gap > float(ndtri(1 - level_at(seeds, until) / 2)) * spread * math.sqrt(2 / seeds)


def _above_the_cap(view: View, runs: int, asked: argparse.Namespace, cluster: ClusterProfile) -> str:
    """Return why --max-gpu-hours ends it, or ""."""
    if asked.max_gpu_hours is None or not cluster.gpus_per_trial:
        return ""
    hours = [view.device_hours(t) for t in view.sweep.trials]
    spent, round_hours = sum(hours), runs * max(hours, default=0.0)
    if spent + round_hours <= asked.max_gpu_hours:
        return ""
    may = f"{spent:,.1f} GPU-hours are spent and the next {runs} runs may take {round_hours:,.1f}"
    return f"{may}, above --max-gpu-hours {asked.max_gpu_hours:g}"
