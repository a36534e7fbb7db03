"""A slot: claim a trial, run it, write its result, return. Slots share nothing but the sweep folder."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnnjepa.config import Device
from jobs.cluster import ClusterProfile, JobSpec, fit_to
from jobs.run import run_job
from sweeps.execution.scheduler import judge, next_claim
from sweeps.state import claims
from sweeps.state.folder import Sweep, TrialState, View, slurm_queue

_CHECK_SECONDS = 0.5
_WAIT_SECONDS = 2.0
_ASK_SLURM_SECONDS = 60.0  # many slots ask


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Within the block what the run prints and logs goes to the end of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a", buffering=1)  # noqa: SIM115, closed below
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            with contextlib.suppress(OSError):  # what a full disk does not take of a log is lost
                file.close()


def stopper(owned: claims.Ownership, asked_to_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether the run must stop, looked at now and then: it was asked to, or its trial is no longer ours."""
    checked, wanted = 0.0, False

    def should_stop() -> bool:
        nonlocal checked, wanted
        now = time.monotonic()
        if not wanted and now - checked > _CHECK_SECONDS:
            checked, wanted = now, asked_to_stop() or owned.lost()
        return wanted

    return should_stop


def run_slot(
    view: View, cluster: ClusterProfile, driver: str, asked_to_stop: Callable[[], bool], start: claims.SlurmStart | None = None
) -> str | None:
    """Run one trial to its end, or to a checkpoint when asked to stop; returns its signature, None where there was none to run."""
    if asked_to_stop():
        return None
    claimed = next_claim(view, driver, start)
    if claimed is None:
        return None
    trial, owned = claimed
    folder = view.sweep.trial_dir(trial)
    fit_to(cluster, trial.config)
    if not cluster.gpus_per_slot and trial.config.device is Device.auto:  # else all slots would crowd the first device
        trial.config.device = Device.cpu
    with owned, output_to(folder / "log" / "train.log"):
        run_job(JobSpec(trial.config, cluster, folder), stopper(owned, asked_to_stop), owned.claim.epoch, judge(view, trial))
    return trial.signature


def run_slots(
    sweep: Sweep,
    cluster: ClusterProfile,
    driver: str,
    asked_to_stop: Callable[[], bool],
    silent: frozenset[Path] = frozenset(),
    start: claims.SlurmStart | None = None,
) -> None:
    """Run one trial; of a search one after the other, since the end of one brings about the next, also that of another slot.

    `silent` are claims of other hosts that the driver has watched for long enough to know that they are dead.
    """
    # Each choice looks anew, and what has ended is read once.
    view = View(sweep, silent, slurm_queue(sweep, _ASK_SLURM_SECONDS), remember_seconds=math.inf)
    while not asked_to_stop() and view.follow():
        done = run_slot(view, cluster, driver, asked_to_stop, start)
        if sweep.search is None:
            return
        if done is None:
            view.look_again()
            if TrialState.running not in view.states().values():
                return
            time.sleep(_WAIT_SECONDS)
