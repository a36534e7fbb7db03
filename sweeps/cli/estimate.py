"""Estimate a sweep's cost before it starts, compare it with the limits, and print it."""

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnjepa.run.folder import RunStatus
from cnnjepa.run.identity import length
from jobs.cluster import ClusterProfile
from jobs.cost import Estimate, combined, estimate, same_shape
from jobs.slurm.queue import site_tool
from sweeps.execution.changes import left_to_run
from sweeps.report.status import trial_status
from sweeps.search.search import Outlook, epochs_expected
from sweeps.spec.check import borders
from sweeps.spec.space import applied
from sweeps.spec.sweep import FIRST_SEED, Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View


def hours_of(view: View, like: dict[str, Any], cluster: ClusterProfile) -> list[float]:
    """Return device-hours per epoch of a sweep's completed Slurm runs that cost like `like`."""
    hours = []
    for trial in view.sweep.trials:
        result = view.result(trial)
        past = view.claims(trial) if result and result.status is RunStatus.completed else []
        if result and past and past[-1].slurm is not None and same_shape(trial.values, like):
            devices = past[-1].slurm.gpus or cluster.cores_per_trial
            hours.append(result.seconds / 3600 / trial.epochs * devices)
    return hours


def measured_hours(runs_dir: Path, like: dict[str, Any], cluster: ClusterProfile) -> list[float]:
    """Return device-hours per epoch of all such runs under `runs_dir`."""
    hours = []
    for file in sorted(runs_dir.glob("*/sweep.json")):
        try:
            hours += hours_of(View(Sweep.load(file.parent)), like, cluster)
        except ValueError:
            continue  # another sweep's broken file must not stop this one
    return hours


def kinds_of(sweep: Sweep) -> list[list[Trial]]:
    """Group the trials by the cost of an epoch."""
    kinds: list[list[Trial]] = []
    for trial in sweep.trials:
        alike = next((kind for kind in kinds if same_shape(trial.values, kind[0].values)), [])
        if not alike:
            kinds.append(alike)
        alike.append(trial)
    return kinds


def estimate_of(view: View, cluster: ClusterProfile, retry_failed: bool) -> Estimate:
    """Estimate what is left of the sweep, including failed runs if they are retried.

    A run that a search may still choose counts as its longest, and as the most expensive kind that
    the bounds of its space show.
    """
    search, folder = view.sweep.search, view.sweep.path.parent
    left = {t.signature: t.epochs * (1 - trial_status(view, t)["done"]) for t in left_to_run(view, retry_failed)}
    at_most = bool(view.sweep.rungs) or search is not None
    # Of each kind: a configuration of it, the epochs of its runs that are left, and those of its longest run.
    kinds = [(k[0].values, [left[t.signature] for t in k if t.signature in left], max(t.epochs for t in k)) for k in kinds_of(view.sweep)]
    if search is not None:  # as if nothing were stopped early
        further = [applied(search.base, params, FIRST_SEED) for params in borders(search.space, search.base)]
        longest = max(length(values) for values in further)
        dearest = _dearest(further, folder, cluster)
        alike = [kind for kind in kinds if same_shape(kind[0], dearest)]
        same = alike[0] if alike else (dearest, [], longest)
        kinds = [kind for kind in kinds if kind is not same]
        kinds.insert(0, (same[0], [*same[1], *[float(longest)] * Outlook(view).runs_left_at_most], max(same[2], longest)))
    estimates = [estimate(cluster, v, e, longest, measured_hours(folder, v, cluster), at_most=at_most) for v, e, longest in kinds]
    return combined(estimates, cluster)


def _dearest(every: list[dict[str, Any]], folder: Path, cluster: ClusterProfile) -> dict[str, Any]:
    """Return the configuration with the most expensive epoch, or the first whose epoch has no known price."""
    kinds: list[dict[str, Any]] = []
    for values in every:
        if not any(same_shape(values, known) for known in kinds):
            kinds.append(values)
    if len(kinds) == 1:
        return kinds[0]
    known = [estimate(cluster, v, [1.0], 1.0, measured_hours(folder, v, cluster)).device_hours_per_epoch for v in kinds]
    prices = [math.inf if price is None else price for price in known]
    return kinds[prices.index(max(prices))]


def budget_of(sweep: Sweep) -> float | None:
    """Return the device-hours beyond which a search begins no run, or None without a budget."""
    return sweep.search.budget_hours if sweep.search is not None else None


def check_budget(sweep: Sweep, price: Estimate) -> None:
    """Raise ValueError if a search's budget does not cover its first run."""
    budget, rate = budget_of(sweep), price.device_hours_per_epoch
    cost = None if rate is None else rate * sweep.trials[0].epochs
    if budget is not None and cost is not None and budget < cost:
        raise ValueError(f"--budget-gpu-hours must be at least the {cost:,.1f} {price.unit} of one run; got {budget:g}")


def check_cap(cap: float | None, price: Estimate, budget: float | None = None) -> None:
    """Raise ValueError if the cost is unknown or above `cap`, unless `budget` is within it."""
    if cap is None or price.unit != "GPU-hours" or not price.trials or (budget is not None and budget <= cap):
        return
    if price.device_hours is None:
        raise ValueError(f"--max-gpu-hours must be left out while the cost is unknown; got {cap:g}: {price.source}")
    if price.device_hours > cap:
        raise ValueError(f"--max-gpu-hours must be at least the cost estimate of {price.device_hours:,.0f} GPU-hours; got {cap:g}")


def show_estimate(sweep: Sweep, price: Estimate, console: Console) -> None:
    """Print the cost estimate and the site's balance."""
    for line in price.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if sweep.rungs and sweep.search is not None and (rate := price.device_hours_per_epoch) is not None:
        hours = rate * epochs_expected(Outlook(View(sweep)))
        console.print(f"  about {hours:,.0f} of them if one in {sweep.eta} continues at each rung", highlight=False)
    if (budget := budget_of(sweep)) is not None:
        console.print(f"  the search starts no run that could take it above {budget:g} {price.unit}", highlight=False, soft_wrap=True)
        if price.device_hours_per_epoch is None:
            first = "one run goes first to measure the cost; the others start after it, if you watch or run the command again"
            console.print(f"  {first}", highlight=False, soft_wrap=True)
    if has := site_tool("sbalance"):
        console.print(f"sbalance:\n{has}", highlight=False, soft_wrap=True)


def priced(sweep: Sweep, cluster: ClusterProfile, asked: argparse.Namespace) -> tuple[Sweep, Estimate]:
    """Return the sweep with its expected cost, and the estimate; raise ValueError above a limit."""
    price = estimate_of(View.here(sweep), cluster, asked.retry_failed)
    sweep = sweep.expecting(price.device_hours_per_epoch)
    check_budget(sweep, price)
    check_cap(asked.max_gpu_hours, price, budget_of(sweep))
    return sweep, price
