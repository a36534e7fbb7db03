"""One job, from its JobSpec to its result: any failure of the run becomes a recorded cause."""

import logging
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cnnjepa.config import validate
from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data.loader import build_plan
from cnnjepa.distributed import is_main_rank, pick_device, rank_count
from cnnjepa.runs import RunFolder, RunResult, RunStatus
from cnnjepa.train import NonFiniteError, RunError, never, train
from jobs import provenance
from jobs.spec import JobSpec

log = logging.getLogger(__name__)

INTERRUPTED = 130  # exit status of a command that was stopped and has saved


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 make the yielded function true; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        print(f"{signal.Signals(number).name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_writable(folder: Path, key: str) -> None:
    """Raise ValueError unless files can be made in `folder`, which is created where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key} must be a folder that can be written; got {folder}: {error.strerror}") from error


def check_job(job: JobSpec, ranks: int = 1, splits: Splits | None = None) -> Splits:
    """Raise ValueError for whatever would stop `job` at its start; returns the data's splits, to be handed to the next check."""
    validate(job.train, ranks)
    pick_device(job.train.device)
    require_writable(job.run_dir, "run_dir")
    RunFolder(job.run_dir).prepare(job.train)
    splits = splits or load_splits(job.train.data)
    build_plan(job.train, len(splits.pretrain), ranks)
    return splits


def run_job(job: JobSpec, should_stop: Callable[[], bool] = never, claim: int = 0) -> RunResult | None:
    """Train to the end, or to None where `should_stop` ended it early and saved it.

    Raises ValueError where the folder holds another configuration; whatever else goes wrong on a rank alone is a result `failed` with
    its cause, and its traceback is in the log. With several ranks it is raised, and the launcher must end the others.
    """
    folder = RunFolder(job.run_dir)
    if is_main_rank():
        folder.prepare(job.train)
        if job.retry_failed:
            folder.set_failure_aside()
        provenance.record(job.run_dir)
    try:
        return train(job.train, folder, should_stop, claim)
    except Exception as error:
        log.error("%s", traceback.format_exc())
        reached = error if isinstance(error, RunError) else RunError(0, 0.0, 0.0)
        origin = error.__cause__ or error
        cause = f"{type(origin).__name__}: {' '.join(str(origin).split())}"[:500]
        result = RunResult(RunStatus.failed, cause, step=reached.step, seconds=reached.seconds, claim=claim)
        result.device_hours = reached.device_hours
        if rank_count() == 1:
            folder.write_result(result)
            return result
        # With several ranks an error may be no more than the death of a peer, from which the run can be resumed: only what every rank
        # has seen alike is recorded. The others may wait in a collective: this process's death tells the launcher to end them.
        if isinstance(origin, NonFiniteError):
            folder.write_result(result)
        raise
