"""Everything that a run consists of, what a checkpoint holds of it, and how it resumes."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnnjepa import weights
from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data.faults import raise_alike
from cnnjepa.data.loader import Plan, build_plan
from cnnjepa.data.skipped import without_bad
from cnnjepa.distributed import GradientBuckets
from cnnjepa.methods._base import build_method, weights_dtype
from cnnjepa.monitoring.gpu import BusyMeter, EnergyMeter, nvml_joules, nvml_utilisation
from cnnjepa.monitoring.recorder import Recorder
from cnnjepa.optim import build_optimizer
from cnnjepa.run import checkpoint
from cnnjepa.run.checkpoint import Checkpoint
from cnnjepa.run.consistency import ImagesChangedError, PastTheEndError, starting_point
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.pace import Pace
from cnnjepa.run.ranks import Ranks, broadcast_object
from cnnjepa.run.saver import Saver

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that a run consists of. `state` and `restore` define what a checkpoint holds."""

    config: TrainConfig
    folder: RunFolder
    ranks: Ranks
    splits: Splits
    plan: Plan
    method: Any  # a Method of cnnjepa/methods
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    buckets: GradientBuckets
    meter: EnergyMeter
    saver: Saver
    step: int = 0  # optimiser steps done
    resumes: int = 0
    earlier_seconds: float = 0.0  # spent before this process took over, from the checkpoint
    started: float = field(default_factory=time.perf_counter)
    training_seconds: float = 0.0  # of `seconds`, those inside the loop
    # of `training_seconds`, those in which this rank waited for its loader
    data_wait_seconds: float = 0.0
    busy: BusyMeter = field(default_factory=lambda: BusyMeter(None))
    pace: Pace = field(default_factory=lambda: Pace(Path(), 0, is_main=False))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights."""
        return weights_dtype(self.config)

    @property
    def epoch(self) -> float:
        """Return the epochs done."""
        return self.step / self.plan.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Return the seconds spent training and probing, over all resumes.

        Time that a kill discarded, since the last checkpoint, is not included.
        """
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def device_hours(self) -> float:
        """Return GPU-hours on CUDA, core-hours on CPU."""
        devices = 1 if self.ranks.device.type == "cuda" else self.config.threads
        return self.seconds / 3600 * self.ranks.count * devices

    @property
    def data_wait_share(self) -> float | None:
        """Return the share of loop time this rank waited for its loader; None without loop time."""
        return self.data_wait_seconds / self.training_seconds if self.training_seconds > 0 else None

    @property
    def energy_kwh(self) -> float | None:
        """Return the energy of all ranks' GPUs, or None if the device does not report it.

        The main rank reads its own GPU and assumes that all are alike.
        """
        joules = self.meter.joules
        return None if joules is None else joules * self.ranks.count / 3.6e6

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds. Randomness depends only on the step: it has no state."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "data_wait_seconds": self.data_wait_seconds,
            "resumes": self.resumes,
            "joules": self.meter.joules,
            "gpu_utilisation": self.busy.recorded,
            "records": self.folder.mark(),
            "images": self.plan.images,
            "steps_per_epoch": self.plan.steps_per_epoch,
            "total_steps": self.plan.total_steps,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.step, self.earlier_seconds, self.resumes = state["step"], state["seconds"], state["resumes"] + 1
        self.training_seconds = state["training_seconds"]
        self.data_wait_seconds = state["data_wait_seconds"]
        self.meter.resume(state["joules"])
        self.busy.recorded = state["gpu_utilisation"]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_run(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> Run:
    """Return a run at step 0, with the same weights on every rank."""
    splits = without_bad(load_splits(config.data), config, folder, ranks)
    plan = build_plan(config, len(splits.pretrain), ranks.count)
    method = build_method(config, plan.total_steps, ranks.device)
    method.splits = splits
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer, buckets = build_optimizer(config.optimizer, parameters), GradientBuckets(parameters, ranks)
    saver = Saver(folder.checkpoints, 60 * config.checkpoint.every_minutes, config.checkpoint.keep, folder.attempt)
    meter, busy = EnergyMeter(nvml_joules(ranks.device)), BusyMeter(nvml_utilisation(ranks.device))
    pace = Pace(folder.path, folder.attempt, config.hang_minutes, ranks.is_main and folder.attempt > 0)
    return Run(config, folder, ranks, splits, plan, method, optimizer, parameters, buckets, meter, saver, busy=busy, pace=pace)


def resume(run: Run) -> Checkpoint | None:
    """Resume from the newest intact checkpoint whose records are whole, if any, on every rank.

    Return it. Without one, load the weights of `encoder.weights`. Raise PastTheEndError on every rank
    if the run has become shorter, ImagesChangedError if it has other images than it began with, and
    WeightsChangedError if the weights are not those that it was planned with.
    """
    found, refused = None, None
    if run.ranks.is_main:
        try:
            found = starting_point(run.folder, run.plan.total_steps, run.config.log.every_steps, run.plan.images)
        except (ImagesChangedError, PastTheEndError) as error:
            refused = error
    if (refused := broadcast_object(refused, run.ranks)) is not None:
        raise refused
    found = broadcast_object(found, run.ranks)
    if found is None and run.config.encoder.weights:
        start_from_weights(run)
    if found is not None:
        run.restore(checkpoint.read(found, run.ranks.device))
        if run.ranks.is_main:
            log.warning("resuming %s at step %d of %d", run.folder.path.name, run.step, run.plan.total_steps)
    return found


def start_from_weights(run: Run) -> None:
    """Load `encoder.weights`, alike on every rank; raise on all of them what any raises."""
    fault: Exception | None = None
    try:
        run.method.start_from(weights.planned(run.config))
    except Exception as error:
        fault = error
    raise_alike(fault, run.ranks)
    if run.ranks.is_main:
        log.info("starting from %s", run.config.encoder.weights)


def own(run: Run, begun: Checkpoint | None) -> Recorder:
    """Return the recorder, with all that the run continues from copied to files of this attempt."""
    recorder = Recorder(run.folder, run.step, run.ranks.is_main, run.config, None if begun is None else begun.attempt)
    if begun is not None and run.ranks.is_main:
        checkpoint.adopt(begun, run.folder.attempt)
    return recorder
