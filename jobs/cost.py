"""Estimate GPU-hours and wall-clock time of a sweep, from measured runs if there are any."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.cluster import ClusterProfile
from jobs.task import task_of


@dataclass(frozen=True)
class Estimate:
    """Cost of the trials that are still to run. Hours are None if unknown."""

    trials: int
    epochs: float  # still to train, over all trials
    device_hours_per_epoch: float | None
    source: str
    unit: str  # GPU-hours, or core-hours if a worker has no GPU
    wall_hours: float | None
    parallel: int
    chunks: int  # consecutive jobs that one trial needs under the time limit
    at_most: bool  # some runs may be stopped early or not be needed
    counted: str = "epochs"  # what `epochs` counts: epochs or steps; "" if the length of a run is unknown

    @property
    def device_hours(self) -> float | None:
        """Return the device-hours of all trials together, or None."""
        return None if self.device_hours_per_epoch is None else self.epochs * self.device_hours_per_epoch

    def lines(self) -> list[str]:
        """Return the lines to print."""
        head = f"cost estimate: {'at most ' * self.at_most}{self.trials} runs"
        rate, one = self.device_hours_per_epoch, self.counted.removesuffix("s") or "run"
        if self.counted:
            head += f", {self.epochs:g} {self.counted} to train"
        elif self.device_hours is not None:
            rate = self.device_hours / max(self.trials, 1)
        if self.device_hours is None or self.wall_hours is None:
            return [head, f"  cost unknown: {self.source}"]
        chain = f", each in {self.chunks} consecutive jobs" if self.chunks > 1 else ""
        return [
            f"{head} x {rate:.4g} {self.unit} per {one} = {self.device_hours:,.0f} {self.unit}",
            f"  cost per {one}: {self.source}",
            f"  wall-clock: {self.wall_hours:,.1f} h with {self.parallel} at once{chain}, not counting the queue",
        ]


def same_shape(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether an epoch of both configurations costs the same, according to their task."""
    return task_of(a) is task_of(b) and task_of(a).cost_shape(a) == task_of(b).cost_shape(b)


def estimate(
    cluster: ClusterProfile,
    config: dict[str, object],
    epochs_left: Sequence[float],
    epochs_of_a_trial: float,
    measured: Sequence[float],
    at_most: bool = False,
) -> Estimate:
    """Estimate trials like `config`; `measured` holds device-hours per epoch of finished runs."""
    unit = "GPU-hours" if cluster.gpus_per_trial else "core-hours"
    devices = cluster.gpus_per_trial or cluster.cores_per_trial
    per_epoch: float | None = None
    published = task_of(config).published_cost(config) if cluster.gpus_per_trial else None
    if measured:
        per_epoch = statistics.median(measured)
        source = f"measured by this code, median of {len(measured)} runs"
    elif published is not None:
        per_epoch, source = published[0], f"{published[1]}; no such run of this code has finished yet"
    else:
        source = "no run of this kind has finished yet, and none is published; the first finished run will tell"
    parallel = min(cluster.max_parallel or len(epochs_left), len(epochs_left)) or 1
    wall, chunks = None, 1
    if per_epoch is not None:
        hours = [e * per_epoch / devices for e in epochs_left]
        wall = max(sum(hours) / parallel, *hours, math.ceil(len(hours) / parallel) * statistics.fmean(hours)) if hours else 0.0
        usable = (60 * cluster.time_limit_minutes - cluster.stop_signal_seconds) / 3600
        chunks = max(math.ceil(epochs_of_a_trial * per_epoch / devices / usable), 1)
    return Estimate(
        len(epochs_left), sum(epochs_left), per_epoch, source, unit, wall, parallel, chunks, at_most, task_of(config).counted(config)
    )


def combined(estimates: Sequence[Estimate], cluster: ClusterProfile) -> Estimate:
    """Add up estimates of different kinds of runs; the total is unknown if any of them is."""
    estimates = [e for e in estimates if e.trials] or estimates[:1]
    if len(estimates) == 1:
        return estimates[0]
    trials, epochs = sum(e.trials for e in estimates), sum(e.epochs for e in estimates)
    parallel = min(cluster.max_parallel or trials, trials)
    unit, counted = estimates[0].unit, estimates[0].counted  # of one task
    chunks, at_most = max(e.chunks for e in estimates), any(e.at_most for e in estimates)
    unknown = [e for e in estimates if e.device_hours is None]
    if unknown:
        source = f"{sum(e.trials for e in unknown)} of the runs: {unknown[0].source}"
        known = sum(e.device_hours or 0.0 for e in estimates)
        source += f"; the others come to {known:,.0f} {unit}" if known else ""
        return Estimate(trials, epochs, None, source, unit, None, parallel, chunks, at_most, counted)
    hours = sum(e.device_hours or 0.0 for e in estimates)
    devices = cluster.gpus_per_trial or cluster.cores_per_trial
    longest = max((e.device_hours or 0.0) / e.trials / devices for e in estimates)  # a run of the most expensive kind
    source = f"mean of {len(estimates)} kinds of runs: " + "; ".join(dict.fromkeys(e.source for e in estimates))
    wall = max(hours / devices / parallel, longest)
    return Estimate(trials, epochs, hours / epochs, source, unit, wall, parallel, chunks, at_most, counted)
