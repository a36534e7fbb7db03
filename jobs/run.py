"""One job, from its JobSpec to its result: any failure of the run becomes a recorded cause."""

import logging
import traceback
from collections.abc import Callable

from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data.loader import build_plan
from cnnjepa.distributed import is_main_rank, pick_device, rank_count
from cnnjepa.rules import validate
from cnnjepa.runs import RunFolder, RunResult, RunStatus
from cnnjepa.train import HopelessError, RunError, never, no_judge, train
from jobs import provenance
from jobs.door import require_writable
from jobs.spec import JobSpec

log = logging.getLogger(__name__)


def check_job(job: JobSpec, ranks: int = 1, splits: Splits | None = None) -> Splits:
    """Raise ValueError for whatever would stop `job` at its start; returns the data's splits, to be handed to the next check."""
    validate(job.train, ranks)
    pick_device(job.train.device)
    require_writable(job.run_dir, "run_dir")
    RunFolder(job.run_dir).prepare(job.train)
    splits = splits or load_splits(job.train.data)
    build_plan(job.train, len(splits.pretrain), ranks)
    return splits


def run_job(
    job: JobSpec, should_stop: Callable[[], bool] = never, claim: int = 0, judge: Callable[[int, dict[str, float]], str] = no_judge
) -> RunResult | None:
    """Train to the end, to where `judge` prunes it, or to None where `should_stop` ended it early and saved it.

    Raises ValueError where the folder holds another configuration; whatever else goes wrong on a rank alone is a result `failed` with
    its cause, and its traceback is in the log. With several ranks it is raised, and the launcher must end the others.
    """
    folder = RunFolder(job.run_dir)
    if is_main_rank():
        folder.prepare(job.train)
        if job.retry_failed:
            folder.set_aside(RunStatus.failed)
        provenance.record(job.run_dir)
    try:
        return train(job.train, folder, should_stop, claim, judge)
    except Exception as error:
        log.error("%s", traceback.format_exc())
        reached = error if isinstance(error, RunError) else RunError(0, 0.0, 0.0)
        origin = error.__cause__ or error
        cause = f"{type(origin).__name__}: {' '.join(str(origin).split())}"[:500]
        result = RunResult(RunStatus.failed, cause, step=reached.step, seconds=reached.seconds, claim=claim)
        result.device_hours, result.probes = reached.device_hours, folder.probes()
        if rank_count() == 1:
            folder.write_result(result)
            return result
        # With several ranks an error may be no more than the death of a peer, from which the run can be resumed: only what every rank
        # has seen alike is recorded. The others may wait in a collective: this process's death tells the launcher to end them.
        if isinstance(origin, HopelessError):
            folder.write_result(result)
        raise
