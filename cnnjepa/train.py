"""The one loop: pretrains any method on any number of ranks, and resumes bit for bit on CPU."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import Precision, TrainConfig, method_module
from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data.loader import Loaded, Plan, build_plan, normalise, train_loader
from cnnjepa.distributed import GradientBuckets, Ranks, RunningStatistics, broadcast_object, joined
from cnnjepa.monitoring.gpu import BusyMeter, EnergyMeter, nvml_joules, nvml_utilisation
from cnnjepa.monitoring.memory import peak_memory_mb, reset_peak_memory
from cnnjepa.monitoring.progress import TrainingProgress
from cnnjepa.monitoring.recorder import Recorder
from cnnjepa.monitoring.telemetry import Telemetry
from cnnjepa.optim import build_optimizer, set_learning_rate, set_weight_decay
from cnnjepa.probes import run_probes
from cnnjepa.probes.collapse import collapsed
from cnnjepa.randomness import Stream, integer
from cnnjepa.rules import validate
from cnnjepa.run import checkpoint
from cnnjepa.run.files import remove_partial
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.saver import PATIENCE_AT_END_SECONDS, PATIENCE_AT_STOP_SECONDS, Saver, insist
from cnnjepa.schedules import learning_rate, weight_decay

log = logging.getLogger(__name__)


class HopelessError(RuntimeError):
    """The run itself is at fault and every rank has seen it: tried again, it would come to the same."""


class CollapsedError(HopelessError):
    """The features have collapsed; training on would cost and give nothing."""


class NonFiniteError(HopelessError):
    """The loss or the gradient was not a number; the weights are those before the step."""


class RunError(RuntimeError):
    """Training ended by an error, which is its cause; tells what had been reached and spent."""

    def __init__(self, step: int, seconds: float, device_hours: float) -> None:
        super().__init__(f"training ended by an error at step {step}")
        self.step, self.seconds, self.device_hours = step, seconds, device_hours


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


def no_judge(epoch: int, metrics: dict[str, float]) -> str:
    """Every run is worth its end."""
    return ""


@dataclass
class Run:
    """All that a run consists of; what a checkpoint must hold is in `state` and `restore`."""

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
    earlier_seconds: float = 0.0  # spent before this process took over, as its checkpoint tells
    started: float = field(default_factory=time.perf_counter)
    training_seconds: float = 0.0  # of `seconds`, those inside the loop
    data_wait_seconds: float = 0.0  # of `training_seconds`, those in which this rank waited for its loader
    busy: BusyMeter = field(default_factory=lambda: BusyMeter(None))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; bf16 is autocast around fp32 weights."""
        return torch.float64 if self.config.precision is Precision.fp64 else torch.float32

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.plan.steps_per_epoch

    @property
    def seconds(self) -> float:
        """Spent training and probing, over all resumes; what a kill threw away since the last checkpoint is not in it."""
        return self.earlier_seconds + time.perf_counter() - self.started

    @property
    def device_hours(self) -> float:
        """GPU-hours on CUDA, core-hours on CPU."""
        devices = 1 if self.ranks.device.type == "cuda" else self.config.threads
        return self.seconds / 3600 * self.ranks.count * devices

    @property
    def data_wait_share(self) -> float | None:
        """Of the time in the loop, what this rank waited for its loader; None before any was counted."""
        return self.data_wait_seconds / self.training_seconds if self.training_seconds > 0 else None

    @property
    def energy_kwh(self) -> float | None:
        """Of all ranks' GPUs, taken to be alike: the main rank reads its own. None where the device does not tell."""
        joules = self.meter.joules
        return None if joules is None else joules * self.ranks.count / 3.6e6

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; randomness is a function of the step and needs none of it."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "data_wait_seconds": self.data_wait_seconds,
            "resumes": self.resumes,
            "joules": self.meter.joules,
            "gpu_utilisation": self.busy.told,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.step, self.earlier_seconds, self.resumes = state["step"], state["seconds"], state["resumes"] + 1
        self.training_seconds = state["training_seconds"]
        self.data_wait_seconds = state["data_wait_seconds"]
        self.meter.resume(state["joules"])
        self.busy.told = state["gpu_utilisation"]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_run(config: TrainConfig, folder: RunFolder, ranks: Ranks) -> Run:
    """A run at step 0; the same weights on every rank."""
    splits = load_splits(config.data)
    plan = build_plan(config, len(splits.pretrain), ranks.count)
    dtype = torch.float64 if config.precision is Precision.fp64 else torch.float32
    method = method_module(config.method.name).Method(config, plan.total_steps)
    method = method.to(device=ranks.device, dtype=dtype, memory_format=torch.channels_last).train()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer, buckets = build_optimizer(config.optimizer, parameters), GradientBuckets(parameters, ranks)
    saver = Saver(folder.checkpoints, 60 * config.checkpoint.every_minutes, config.checkpoint.keep)
    meter, busy = EnergyMeter(nvml_joules(ranks.device)), BusyMeter(nvml_utilisation(ranks.device))
    return Run(config, folder, ranks, splits, plan, method, optimizer, parameters, buckets, meter, saver, busy=busy)


def resume(run: Run) -> None:
    """Take up the newest intact checkpoint of the run folder, the same one on every rank; nothing where there is none."""
    found = None
    if run.ranks.is_main:
        remove_partial(run.folder.checkpoints)
        found = checkpoint.newest_good(run.folder.checkpoints, set_aside=True)
    found = broadcast_object(found, run.ranks)
    if found is not None:
        run.restore(checkpoint.read(found, run.ranks.device))
        if run.ranks.is_main:
            log.warning("resuming %s at step %d of %d", run.folder.path.name, run.step, run.plan.total_steps)


def micro_batch(run: Run, loaded: Loaded, micro_step: int, shown: dict[str, Tensor] | None = None) -> Batch:
    """Loaded pixels as a method's batch, which leaves its features in `shown`."""
    views, labels = loaded
    pixels = [normalise(v, run.splits, run.ranks.device, run.dtype) for v in views]
    positions = run.plan.positions(run.ranks.rank, micro_step)
    return Batch(pixels, run.step, positions, labels.to(run.ranks.device, non_blocking=True), shown)


def forward_backward(run: Run, loader: Any, shown: dict[str, Tensor] | None = None) -> tuple[Tensor, Batch]:
    """Add the gradients of this rank's micro-batches, each counting alike; the last leaves its features in `shown`.

    Returns [loss, visible fraction], averaged over them, and the last one.
    """
    autocast = torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=run.config.precision is Precision.bf16)
    sums = torch.zeros(2, dtype=run.dtype, device=run.ranks.device)
    # A method that draws random numbers while training draws the same ones after a resume.
    torch.manual_seed(integer(run.config.seed, Stream.step, run.step, run.ranks.rank))
    for micro_step in range(run.plan.micro_batches):
        asked = time.perf_counter()
        loaded = next(loader)
        run.data_wait_seconds += time.perf_counter() - asked
        batch = micro_batch(run, loaded, micro_step, shown if micro_step == run.plan.micro_batches - 1 else None)
        with autocast:
            out = run.method(batch)
        if micro_step == run.plan.micro_batches - 1:
            run.buckets.arm()
        (out["loss"] / run.plan.micro_batches).backward()
        sums += torch.stack([out["loss"].detach(), out.get("visible_fraction", sums.new_ones(()))])
    return sums / run.plan.micro_batches, batch


def gradient_norm(run: Run) -> Tensor:
    """[1], over all parameters."""
    return torch.nn.utils.get_total_norm([p.grad for p in run.parameters if p.grad is not None]).to(run.dtype).reshape(1)


def require_finite(run: Run, loss: float, norm: float, lr: float) -> None:
    """Raise NonFiniteError where the loss or the gradient's norm is not a number, before the weights are touched."""
    if not np.isfinite(loss) or not np.isfinite(norm):
        raise NonFiniteError(f"loss {loss:g} and gradient norm {norm:g} must be finite: step {run.step}, learning rate {lr:g}")


def train(
    config: TrainConfig,
    folder: RunFolder,
    should_stop: Callable[[], bool] = never,
    claim: int = 0,
    judge: Callable[[int, dict[str, float]], str] = no_judge,
) -> RunResult | None:
    """Run `config` to its end in `folder`, from its newest intact checkpoint; None where `should_stop` ended it early, saved.

    `folder` is one that `RunFolder.prepare` made for `config`; where it has a result, that is returned and nothing is computed.
    `should_stop` may differ between ranks: all stop at the same step, after a checkpoint. `judge` is asked on the main rank after each
    probe on the way, and again by a run that is resumed there, with the epoch and the metrics; a cause that it returns ends the run as
    pruned, after a checkpoint from which it can be taken up. Raises ValueError for a configuration that cannot run, and RunError, caused
    by a HopelessError where it diverged or collapsed, when training breaks off.
    """
    torch.set_num_threads(config.threads)
    reset_peak_memory()
    with joined(config.device) as ranks:
        validate(config, ranks.count)
        done = broadcast_object(folder.result() if ranks.is_main else None, ranks)
        if done is not None:
            return done
        run = build_run(config, folder, ranks)
        resume(run)
        recorder = Recorder(folder, run.step, ranks.is_main, config)
        try:
            ended = train_steps(run, recorder, should_stop, judge)
            if ended is None:
                return None
            result = finish(run, recorder, claim, ended)
            if not ended:
                recorder.complete()
            return result
        except Exception as error:
            raise RunError(run.step, run.seconds, run.device_hours) from error
        finally:
            run.saver.settle()
            recorder.close()


def train_steps(run: Run, recorder: Recorder, should_stop: Callable[[], bool], judge: Callable[[int, dict[str, float]], str]) -> str | None:
    """The loop, from `run.step` on: "" at the end, why where it was pruned, None where it was asked to stop; the last step is saved."""
    config, plan, ranks = run.config, run.plan, run.ranks

    def asked(metrics: dict[str, float]) -> str:
        """The judge's verdict, on every rank."""
        return broadcast_object(judge(round(run.epoch), metrics) if ranks.is_main else None, ranks) or ""

    # Where it was saved at a probe it may have been pruned there, and killed before that was written down.
    if run.step and probe_due(run) and (pruned := asked(run.folder.probes().get(f"{run.epoch:g}", {}))):
        return pruned
    # Loader processes are forked, here and for probes: no thread may hold a lock meanwhile.
    loader = train_loader(config, run.splits, run.method.views(config), plan, ranks, run.step, before_start=run.saver.settle)
    if ranks.is_main and run.step == 0:  # a run killed before its first interval has a checkpoint to come back to
        run.saver.begin(0, run.state(), run.folder.sync)
    statistics, telemetry = RunningStatistics(run.method, ranks), Telemetry(run.method, recorder.has_board)
    noted = run.training_seconds, run.data_wait_seconds
    with TrainingProgress(plan.total_steps, run.step, config.global_batch_size, ranks.is_main) as progress:
        while run.step < plan.total_steps:
            step_started = time.perf_counter()
            logged_now, pictured_now = logs_at(run, run.step + 1), pictures_at(run, run.step + 1)
            telemetry.start_step(logged_now, pictured_now)
            lr = learning_rate(config.optimizer, run.step, plan.steps_per_epoch, plan.total_steps)
            set_learning_rate(run.optimizer, lr)
            set_weight_decay(run.optimizer, weight_decay(config.optimizer, run.step, plan.total_steps))
            run.optimizer.zero_grad()
            statistics.start_step()
            sums, batch = forward_backward(run, loader, telemetry.shown)
            statistics.end_step()
            wishes = torch.cat([sums, sums.new_full((1,), should_stop())])
            # The one place where the host waits for the device: whether to take the step, and whether to stop after it.
            loss, visible, stop, norm = torch.cat([run.buckets.finish(wishes), gradient_norm(run)]).tolist()
            require_finite(run, loss, norm, lr)
            telemetry.see_gradients()
            run.optimizer.step()
            logged = run.method.after_step(run.step)
            run.step += 1
            run.training_seconds += time.perf_counter() - step_started

            if logged_now:
                pace, waited = progress.images_per_second(run.step), run.data_wait_seconds - noted[1]
                waited /= max(run.training_seconds - noted[0], 1e-9)
                noted = run.training_seconds, run.data_wait_seconds
                values = {"loss": loss, "lr": lr, "gradient_norm": norm, "visible_fraction": visible, **logged}
                recorder.record(
                    "step",
                    run.step,
                    {"epoch": run.epoch, **values, "images_per_second": pace, "data_wait_share": waited, **run.busy.look()},
                )
                progress.show(run.step, run.epoch, loss, lr, pace)
            telemetry.tell(recorder, run.step)
            if pictured_now:
                recorder.pictures(run.step, run.method.sample_images(batch) if ranks.is_main and config.log.tensorboard else {})
            pruned = ""
            if probe_due(run):
                run.saver.settle()
                metrics, _ = probe(run, recorder, final=False)
                pruned = asked(metrics)
            # All ranks hold the same state: the main one alone writes.
            ended = run.step == plan.total_steps
            if ranks.is_main and (ended or stop or pruned):
                patience = PATIENCE_AT_STOP_SECONDS if stop and not ended else PATIENCE_AT_END_SECONDS
                run.saver.finish(run.step, run.state(), run.folder.sync, patience, final=ended)
            elif ranks.is_main and run.saver.due():
                run.saver.begin(run.step, run.state(), run.folder.sync)
            if pruned:
                return pruned
            if stop and not ended:
                return None
    return ""


def epoch_due(run: Run, every: int) -> bool:
    """True at the end of each `every`-th epoch."""
    return every > 0 and run.step % (every * run.plan.steps_per_epoch) == 0


def logs_at(run: Run, step: int) -> bool:
    """Whether step `step` is recorded."""
    return step % run.config.log.every_steps == 0 or step == run.plan.total_steps


def pictures_at(run: Run, step: int) -> bool:
    """Whether pictures are shown after step `step`: the first, and the last of each so many epochs."""
    every = run.config.log.images_every_epochs
    return every > 0 and (step == 1 or step % (every * run.plan.steps_per_epoch) == 0)


def probe_due(run: Run) -> bool:
    """True at the end of an epoch at which the run is probed on its way, and not at the last, which is probed anyhow."""
    epochs, rest = divmod(run.step, run.plan.steps_per_epoch)
    wanted = epoch_due(run, run.config.probes.every_epochs) or (not rest and epochs in run.config.probes.at_epochs)
    return wanted and run.step < run.plan.total_steps


def probe(run: Run, recorder: Recorder, final: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of all probes, recorded, and the causes of those without value, said; collective. Reads test images only where `final`.

    Raises CollapsedError, on every rank, where the features are of no use.
    """
    metrics, missing = run_probes(run.method.probe_encoder, run.config, run.splits, run.ranks, final)
    recorder.record("final" if final else "probe", run.step, {"epoch": run.epoch, **metrics})
    for name, cause in missing.items() if run.ranks.is_main else ():
        log.warning("probe %s has no value: %s", name, cause)
    if cause := collapsed(metrics, run.config.probes):
        raise CollapsedError(f"collapsed: {cause}, at epoch {run.epoch:g}")
    return metrics, missing


def write_down(folder: RunFolder, result: RunResult) -> bool:
    """Record how the run ended, after all that it told; False where a result of another claim stands."""
    folder.sync()
    return folder.write_result(result)


def finish(run: Run, recorder: Recorder, claim: int, pruned: str) -> RunResult:
    """Write the run's result: of the trained run its last probe, of one that was `pruned`, for that cause, what it had reached."""
    metrics, missing = ({}, {}) if pruned else probe(run, recorder, final=True)
    result = RunResult(
        RunStatus.pruned if pruned else RunStatus.completed,
        cause=pruned,
        metrics=metrics,
        missing=missing,
        probes=run.folder.probes() if run.ranks.is_main else {},
        step=run.step,
        seconds=run.seconds,
        device_hours=run.device_hours,
        # A method without views loads no image.
        images_per_second=run.step * run.config.global_batch_size / run.training_seconds if run.method.views(run.config) else 0.0,
        peak_memory_mb=peak_memory_mb(run.ranks),
        parameters=sum(p.numel() for p in run.parameters),
        resumes=run.resumes,
        claim=claim,
        energy_kwh=run.energy_kwh,
        gpu_utilisation=run.busy.mean,
        data_wait_share=run.data_wait_share if run.method.views(run.config) else None,
    )
    if run.ranks.is_main and not insist(lambda: write_down(run.folder, result), "the result", PATIENCE_AT_END_SECONDS):
        log.warning("%s has a result of another claim already, which stands", run.folder.path)
    return broadcast_object(run.folder.result() if run.ranks.is_main else None, run.ranks) or result
