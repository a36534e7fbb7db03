"""Run one job from its JobSpec to its result; record failures with their cause."""

import copy
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnjepa.run import skipped
from cnnjepa.run.folder import HopelessError, RunError, RunFolder, RunResult, RunStatus, line_of, never, no_judge
from cnnjepa.run.pace import STARTING_SECONDS, Pace
from cnnjepa.run.ranks import Device, broadcast_object, first_of, is_main_rank, joined, rank_count
from jobs import program, provenance
from jobs.cli import ExitedError, require_creatable, require_writable
from jobs.cluster import JobSpec
from jobs.slurm.nodes import NodeFaultError
from jobs.staging import PackedSet, Staging, StagingError
from jobs.task import task_of

log = logging.getLogger(__name__)
_MOST_OF_A_CAUSE = 2000  # characters: two long paths and what is said of them


def charged(cause: str) -> bool:
    """Spare no run: every error is the run's own."""
    return False


def check_jobs(jobs: Sequence[JobSpec], ranks: int = 1) -> None:
    """Create the run folders of `jobs`, all of one task; raise ValueError first if any cannot start."""
    refuse_jobs(jobs, ranks)
    for job in jobs:
        require_writable(job.run_dir, "run_dir")
        RunFolder(job.run_dir).prepare(job.train)


def refuse_jobs(jobs: Sequence[JobSpec], ranks: int = 1, elsewhere: bool = False) -> None:
    """Raise ValueError if any of `jobs`, all of one task, cannot start; leave nothing behind.

    Their devices and data are not looked for if they run `elsewhere`.
    """
    for job in jobs:
        if not elsewhere:
            task_of(job.train).validate(job.train, ranks)
        require_creatable(job.run_dir, "run_dir")
        RunFolder(job.run_dir).is_begun(job.train)
    if jobs and not elsewhere:
        task_of(jobs[0].train).check([job.train for job in jobs], ranks)


def _set_to_stage(job: JobSpec, root: str) -> PackedSet | None:
    """Return the packed set to copy to this node, or None; say why not if that may surprise."""
    if RunFolder(job.run_dir).result() is not None:
        return None
    try:
        packed = PackedSet.of(Path(root))
    except StagingError as error:
        log.warning("not staged: %s", error)
        return None
    if packed is None:
        print(f"not staged: {root} holds loose files and no packed set", flush=True)
    return packed


@contextmanager
def data_at_hand(job: JobSpec, should_stop: Callable[[], bool], pace: Pace | None = None) -> Iterator[Any]:
    """Yield the configuration with its data staged on this node, or None if asked to stop.

    The copy is locked within the block. If one node cannot stage it, all ranks read the original.
    `pace` is told of each part that was copied.
    """
    task = task_of(job.train)
    root = task.get(job.train, "data_root", "")
    if not job.cluster.local_scratch or not root:
        yield job.train
        return
    with joined(task.get(job.train, "device", Device.cpu)) as ranks:
        packed = broadcast_object(_set_to_stage(job, root) if ranks.is_main else None, ranks)
        if packed is None:
            yield job.train
            return
        with Staging(packed, job.cluster.local_scratch) as staging:
            while True:
                done = staging.advance()
                if pace is not None:
                    pace.touch()
                if first_of("stop" if should_stop() else "", ranks):
                    yield None
                    return
                if cause := first_of(staging.cause, ranks):
                    staging.give_up(cause)
                    if ranks.is_main:
                        log.warning("not staged, the run reads %s: %s", packed.folder, cause)
                    break
                if not first_of("" if done else "wait", ranks):
                    break
            config = copy.deepcopy(job.train)
            task.put(config, "data_root", str(staging.root))
            yield config


def run_job(
    job: JobSpec,
    should_stop: Callable[[], bool] = never,
    claim: int = 0,
    judge: Callable[[int, dict[str, float]], str] = no_judge,
    spares: Callable[[str], bool] = charged,
) -> RunResult | None:
    """Train `job`; return its result, or None if `should_stop` ended it after a save.

    Raise ValueError if the folder holds another configuration. With one rank, any other error
    becomes a `failed` result with its cause. With several, a HopelessError does, which every rank
    has; any other error is raised. Each rank passes the cause to `spares`, unless the run itself is
    at fault. If that returns True for the only rank, raise NodeFaultError instead. Raise ExitedError
    if the run exits by itself: no status of its own may look like a run that has ended or was stopped.
    """
    folder = RunFolder(job.run_dir, claim)
    if is_main_rank():
        folder.prepare(job.train)
        if job.retry_failed:
            folder.set_aside(RunStatus.failed)
        provenance.record(job.run_dir)
        if (files := program.find(task_of(job.train).name)) is not None:
            program.note(job.run_dir, claim, files)
    pace = Pace(job.run_dir, claim, is_main=is_main_rank() and claim > 0)
    pace.begin("starting", STARTING_SECONDS)
    try:
        with data_at_hand(job, should_stop, pace) as config:
            return None if config is None else task_of(config).train(config, folder, should_stop, claim, judge)
    except SystemExit as end:
        shown = f"train must return or raise unless it was asked to stop; got sys.exit({'' if end.code is None else repr(end.code)[:200]})"
        log.error("%s", shown)
        raise ExitedError(shown) from end
    except Exception as error:
        log.error("%s", traceback.format_exc())
        reached = error if isinstance(error, RunError) else RunError(0, 0.0, 0.0)
        origin = error.__cause__ or error
        cause = line_of(origin)[:_MOST_OF_A_CAUSE]
        result = RunResult(RunStatus.failed, cause, step=reached.step, seconds=reached.seconds, claim=claim)
        result.device_hours, result.probes = reached.device_hours, folder.probes()
        with suppress(ValueError):  # a damaged list, of which the cause tells
            result.skipped_images = skipped.count(folder.path)
        spared = not isinstance(origin, HopelessError) and spares(cause)
        # With several ranks, the error may be a peer's death, from which the run can resume: record
        # only what every rank raises. The launcher must then end ranks that wait in a collective.
        if rank_count() > 1 and not isinstance(origin, HopelessError):
            raise
        if spared:
            raise NodeFaultError(cause) from error
        folder.write_result(result)
        return result
