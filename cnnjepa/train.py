"""Pretrain any method on any number of ranks, and resume bit for bit on CPU."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import Precision, RateSchedule, TrainConfig
from cnnjepa.data.fingerprint import require_planned_images
from cnnjepa.data.loader import Loaded, MicroBatches, blank_batch, normalise, train_loader
from cnnjepa.data.opened import require_probe_images
from cnnjepa.distributed import RunningStatistics
from cnnjepa.monitoring.memory import peak_memory_mb, reset_peak_memory
from cnnjepa.monitoring.progress import TrainingProgress
from cnnjepa.monitoring.recorder import Recorder
from cnnjepa.monitoring.telemetry import Telemetry
from cnnjepa.optim import set_learning_rate, set_weight_decay
from cnnjepa.probes import Outcome, device_hours, run_probes
from cnnjepa.probes._evaluation import Conditions
from cnnjepa.probes.collapse import collapsed
from cnnjepa.randomness import Stream, integer
from cnnjepa.references import REFERENCE, references
from cnnjepa.rules import validate
from cnnjepa.run import skipped, stable
from cnnjepa.run.consistency import disagreement
from cnnjepa.run.folder import EvaluationStopped, HopelessError, RunError, RunFolder, RunResult, RunStatus, never, no_judge
from cnnjepa.run.pace import PROBE_SECONDS, SAVING_SECONDS
from cnnjepa.run.ranks import broadcast_object, joined
from cnnjepa.run.saver import PATIENCE_AT_END_SECONDS, PATIENCE_AT_STOP_SECONDS, host_copy, retry
from cnnjepa.schedules import learning_rate, stable_steps, weight_decay
from cnnjepa.training_run import Run, build_run, own, resume
from cnnjepa.verdict import Numbers, Seen, Verdicts, reads_late

log = logging.getLogger(__name__)


class CollapsedError(HopelessError):
    """Raised when the features have collapsed; training on would be wasted."""


class NonFiniteError(HopelessError):
    """Raised when the loss or gradient is not finite; no weights that it touched are saved, probed or recorded."""


def micro_batch(run: Run, loaded: Loaded, micro_step: int, shown: dict[str, Tensor] | None = None) -> Batch:
    """Build the method's batch from loaded pixels; the method stores its features in `shown`."""
    views, labels = loaded
    pixels = [normalise(v, run.splits, run.ranks.device, run.dtype) for v in views]
    positions = run.plan.positions(run.ranks.rank, micro_step)
    return Batch(pixels, run.step, positions, labels.to(run.ranks.device, non_blocking=True), shown)


def forward_backward(run: Run, loader: Any, shown: dict[str, Tensor] | None = None) -> tuple[Tensor, Batch]:
    """Add the gradients of this rank's micro-batches, equally weighted.

    Return [loss, visible fraction], averaged over the micro-batches, and the last micro-batch,
    which stores its features in `shown`.
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


def gradients(run: Run) -> list[Tensor]:
    """Return the gradients of all parameters."""
    return [p.grad for p in run.parameters if p.grad is not None]


def gradient_norm(run: Run) -> Tensor:
    """Return the gradient norm over all parameters, [1]."""
    return torch.nn.utils.get_total_norm(gradients(run)).to(run.dtype).reshape(1)


def limit_gradients(run: Run, norm: Tensor) -> None:
    """Scale the gradients, whose norm over all parameters is `norm`, [1], down to the largest norm that is allowed."""
    if most := run.config.optimizer.max_gradient_norm:
        torch._foreach_mul_(gradients(run), (most / norm).clamp(max=1.0).squeeze())  # on the device, which need not be waited for


def judged(run: Run, loader: MicroBatches, numbers: Numbers) -> Seen:
    """Return a step's numbers; raise NonFiniteError, or what a loader raised, on every rank."""
    seen = numbers.read()
    if seen.failed or not seen.is_finite:
        run.step = numbers.step  # the steps that hold
    if seen.failed:
        loader.raise_fault()
    if not seen.is_finite:
        raise NonFiniteError(
            f"loss {seen.loss:g} and gradient norm {seen.norm:g} must be finite: step {numbers.step}, learning rate {numbers.lr:g}"
        )
    return seen


def train(
    config: TrainConfig,
    folder: RunFolder,
    should_stop: Callable[[], bool] = never,
    claim: int = 0,
    judge: Callable[[int, dict[str, float]], str] = no_judge,
) -> RunResult | None:
    """Train `config` to its end in `folder`, starting from the newest intact checkpoint.

    Return the result, or None if `should_stop` ended the run early, after a checkpoint. `folder`
    must have been prepared for `config` by `RunFolder.prepare`. If it already has a result, return
    that and compute nothing.

    `should_stop` may differ between ranks: all ranks stop at the same step. `judge` receives the
    epoch and the metrics. The main rank calls it after each probe during training, and again if a
    run resumes at such a probe. If it returns a cause, the run ends as pruned, after a checkpoint
    from which it can be resumed.

    Raise ValueError if the configuration cannot run, and RunError if training fails. The cause of
    the RunError is a HopelessError if the run diverged, collapsed or has become shorter.
    """
    torch.set_num_threads(config.threads)
    reset_peak_memory()
    with joined(config.device) as ranks:
        validate(config, ranks.count)
        done = broadcast_object(folder.result() if ranks.is_main else None, ranks)
        if done is not None:
            return done
        run = build_run(config, folder, ranks)
        recorder: Recorder | None = None
        try:
            require_planned_images(config, run.splits, folder, ranks)
            recorder = own(run, resume(run))
            if not run.step and config.probes.names:
                require_probe_images(config, run.splits, ranks)
            ended = train_steps(run, recorder, should_stop, judge)
            if ended is None:
                return None
            try:
                result = finish(run, recorder, claim, ended, should_stop)
            except EvaluationStopped as stopped:  # the last checkpoint is there, and what it has computed
                log.warning("stopped in the evaluation %s, which goes on at the next start", stopped)
                return None
            if not ended:
                recorder.complete()
            return result
        except Exception as error:
            raise RunError(run.step, run.seconds, run.device_hours) from error
        finally:
            run.saver.settle()
            if recorder is not None:
                recorder.close()


def train_steps(run: Run, recorder: Recorder, should_stop: Callable[[], bool], judge: Callable[[int, dict[str, float]], str]) -> str | None:
    """Train from `run.step` on; return "" at the end, a cause if pruned, None if asked to stop."""
    config, plan, ranks = run.config, run.plan, run.ranks

    def asked(metrics: dict[str, float]) -> str:
        """Return the judge's verdict, on every rank."""
        return broadcast_object(judge(round(run.epoch), metrics) if ranks.is_main else None, ranks) or ""

    # A run saved at a probe may have been pruned there, and killed before that was recorded.
    if run.step and probe_due(run, run.step) and (pruned := asked(run.folder.probes().get(f"{run.epoch:g}", {}))):
        return pruned
    # Loader processes are forked, here and for probes; no thread may hold a lock at that time.
    views = run.method.views(config)
    loaded = train_loader(config, run.splits, views, plan, ranks, run.step, before_start=run.saver.settle)
    loader = MicroBatches(loaded, blank_batch(run.splits, views, plan), ranks)
    if ranks.is_main and run.step == 0:  # lets a run killed before its first interval resume
        run.saver.begin(0, run.state(), run.folder.sync)
    statistics, telemetry = RunningStatistics(run.method, ranks), Telemetry(run.method, recorder.has_board)
    noted = run.training_seconds, run.data_wait_seconds
    verdicts = Verdicts(lambda numbers: judged(run, loader, numbers), reads_late(ranks.device))
    kept_after = stable_steps(config.optimizer, plan.total_steps) if config.optimizer.schedule is RateSchedule.wsd else 0
    if run.step and run.step == kept_after and ranks.is_main and stable.kept(run.folder.path) is None:
        stable.keep(run.folder, run.step, host_copy(run.state()))  # it was stopped in between
    run.pace.train()
    with TrainingProgress(plan.total_steps, run.step, config.global_batch_size, ranks.is_main) as progress:
        while run.step < plan.total_steps:
            step_started = time.perf_counter()
            logged_now, pictured_now, probed_now = (due(run, run.step + 1) for due in (logs_at, pictures_at, probe_due))
            telemetry.start_step(logged_now, pictured_now)
            lr = learning_rate(config.optimizer, run.step, plan.steps_per_epoch, plan.total_steps)
            set_learning_rate(run.optimizer, lr)
            set_weight_decay(run.optimizer, weight_decay(config.optimizer, run.step, plan.total_steps))
            run.optimizer.zero_grad()
            statistics.start_step()
            sums, batch = forward_backward(run, loader, telemetry.shown)
            statistics.end_step()
            wishes = [sums.new_full((1,), wish) for wish in (should_stop(), ranks.is_main and run.saver.due(), loader.failed)]
            means = run.buckets.finish(torch.cat([sums, *wishes]))
            norm = gradient_norm(run)
            numbers = Numbers(torch.cat([means, norm]), run.step, lr)
            kept_now = run.step + 1 == kept_after
            seen = verdicts.of(numbers, logged_now or pictured_now or probed_now or kept_now)
            telemetry.see_gradients()
            limit_gradients(run, norm)
            run.optimizer.step()
            logged = run.method.after_step(run.step)
            run.step += 1
            run.training_seconds += time.perf_counter() - step_started
            run.pace.step()

            if logged_now and seen is not None:
                pace, waited = progress.images_per_second(run.step), run.data_wait_seconds - noted[1]
                waited /= max(run.training_seconds - noted[0], 1e-9)
                noted = run.training_seconds, run.data_wait_seconds
                values = {"loss": seen.loss, "lr": lr, "gradient_norm": seen.norm, "visible_fraction": seen.visible, **logged}
                recorder.record(
                    "step",
                    run.step,
                    {"epoch": run.epoch, **values, "images_per_second": pace, "data_wait_share": waited, **run.busy.look()},
                )
                progress.show(run.step, run.epoch, seen.loss, lr, pace)
            telemetry.tell(recorder, run.step)
            if pictured_now:
                recorder.pictures(run.step, run.method.sample_images(batch) if ranks.is_main and config.log.tensorboard else {})
            pruned = ""
            if probed_now:
                run.saver.settle()
                metrics = probe(run, recorder, final=False).metrics
                pruned = asked(metrics)
            # All ranks hold the same state, so only the main rank writes.
            if kept_now and ranks.is_main:
                run.saver.settle()
                stable.keep(run.folder, run.step, host_copy(run.state()))
            ended, stop = run.step == plan.total_steps, seen is not None and seen.stop > 0
            if ranks.is_main and (ended or stop or pruned):
                patience = PATIENCE_AT_STOP_SECONDS if stop and not ended else PATIENCE_AT_END_SECONDS
                run.pace.begin("saving", SAVING_SECONDS)
                run.saver.finish(run.step, run.state(), run.folder.sync, patience, final=ended)
            elif ranks.is_main and seen is not None and seen.save:
                run.saver.begin(run.step, run.state(), run.folder.sync)
            if pruned:
                return pruned
            if stop and not ended:
                return None
    return ""


def epoch_due(run: Run, step: int, every: int) -> bool:
    """Return whether an `every`-th epoch ends with step `step`."""
    return every > 0 and step % (every * run.plan.steps_per_epoch) == 0


def logs_at(run: Run, step: int) -> bool:
    """Return whether step `step` is recorded."""
    return step % run.config.log.every_steps == 0 or step == run.plan.total_steps


def pictures_at(run: Run, step: int) -> bool:
    """Return whether pictures are shown after step `step`.

    They are shown after the first step and at the end of every `images_every_epochs`-th epoch.
    """
    every = run.config.log.images_every_epochs
    return every > 0 and (step == 1 or step % (every * run.plan.steps_per_epoch) == 0)


def probe_due(run: Run, step: int) -> bool:
    """Return whether a probe is due after step `step`, except at the run's end, which is always probed."""
    epochs, rest = divmod(step, run.plan.steps_per_epoch)
    wanted = epoch_due(run, step, run.config.probes.every_epochs) or (not rest and epochs in run.config.probes.at_epochs)
    return wanted and step < run.plan.total_steps


def probe(run: Run, recorder: Recorder, final: bool, conditions: Conditions | None = None) -> Outcome:
    """Probe the run on all ranks; record and return the outcome.

    Test images are read only if `final`. Raise CollapsedError on every rank if features collapsed,
    and EvaluationStopped if `conditions` ask to stop.
    """
    with run.pace.within("probing", PROBE_SECONDS):
        found = run_probes(run.method.probe_encoder, run.config, run.splits, run.ranks, final, conditions=conditions)
    recorder.record("final" if final else "probe", run.step, {"epoch": run.epoch, **found.metrics})
    for name, cause in found.missing.items() if run.ranks.is_main else ():
        log.warning("probe %s has no value: %s", name, cause)
    if cause := collapsed(found.metrics, run.config.probes):
        raise CollapsedError(f"collapsed: {cause}, at epoch {run.epoch:g}")
    return found


def write_down(folder: RunFolder, result: RunResult) -> bool:
    """Sync the records and write the result; return False if another claim's result stands."""
    folder.sync()
    if wrong := disagreement(folder, result):
        log.warning("%s", wrong)
    return folder.write_result(result)


def finish(run: Run, recorder: Recorder, claim: int, pruned: str, should_stop: Callable[[], bool] = never) -> RunResult:
    """Write the run's result and return it: the last probe, or the cause if it was pruned.

    Raise EvaluationStopped on all ranks if `should_stop` ended an evaluation.
    """
    conditions = Conditions(run.folder.path / "evaluations", should_stop, run.pace.touch)
    found = Outcome() if pruned else probe(run, recorder, True, conditions)
    with run.pace.within("probing", PROBE_SECONDS):
        own = sum(conditions.spent.values())
        compared = references(run.config, run.folder, run.splits, run.ranks, found, conditions=conditions)
    seconds = run.seconds
    apart = sum(conditions.spent.values()) / max(seconds, 1e-9)
    # A run that computes the scores of the encoder before training, for all runs of a sweep, tells what that took.
    of_reference = device_hours(sum(conditions.spent.values()) - own, run.config, run.ranks)
    result = RunResult(
        RunStatus.pruned if pruned else RunStatus.completed,
        cause=pruned,
        metrics=found.metrics,
        missing=found.missing,
        images=found.images,
        references=compared,
        probes=run.folder.probes() if run.ranks.is_main else {},
        step=run.step,
        seconds=seconds * (1 - apart),
        device_hours=run.device_hours * (1 - apart),
        evaluation_hours={**found.hours, **({REFERENCE: of_reference} if of_reference else {})},
        # A method without views loads no image.
        images_per_second=run.step * run.config.global_batch_size / run.training_seconds if run.method.views(run.config) else 0.0,
        peak_memory_mb=peak_memory_mb(run.ranks),
        parameters=sum(p.numel() for p in run.parameters),
        resumes=run.resumes,
        claim=claim,
        skipped_images=skipped.count(run.folder.path),
        energy_kwh=run.energy_kwh,
        gpu_utilisation=run.busy.mean,
        data_wait_share=run.data_wait_share if run.method.views(run.config) else None,
    )
    if run.ranks.is_main and not retry(lambda: write_down(run.folder, result), "the result", PATIENCE_AT_END_SECONDS, run.saver.note):
        log.warning("%s already has the result of another claim, which is kept", run.folder.path)
    return broadcast_object(run.folder.result() if run.ranks.is_main else None, run.ranks) or result
