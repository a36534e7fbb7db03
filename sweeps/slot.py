"""A slot: claim a trial, run it, write its result, return. Slots share nothing but the sweep folder."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnnjepa.config import Device
from cnnjepa.runs import RunResult, RunStatus
from jobs.run import run_job
from jobs.spec import ClusterProfile, JobSpec
from sweeps import claims, study
from sweeps.folder import Sweep, TrialState, View
from sweeps.spec import Trial

# The fault is the trial's own when its process has died so often in place; a machine's hiccup gets a second chance.
CRASHES_ALLOWED = 2
_CHECK_SECONDS = 0.5


def next_claim(view: View, driver: claims.Process) -> tuple[Trial, claims.Ownership] | None:
    """A trial that is now ours: a half-done one whose owner is gone before a new one of the study; None where nothing is left to begin.

    A trial whose process died CRASHES_ALLOWED times under this driver without gaining a step is recorded as failed instead.
    """
    sweep = view.sweep
    for trial in sweep.trials:
        if view.state(trial) is TrialState.interrupted:
            folder, step = sweep.trial_dir(trial), view.reached_step(trial)
            past = claims.history(folder)
            if claims.crashes_in_place(past, step, driver, folder) >= CRASHES_ALLOWED:
                cause = f"its process died {CRASHES_ALLOWED} times at step {step} without gaining a step; see {folder / 'log'}"
                sweep.run(trial).write_result(RunResult(RunStatus.failed, cause, step=step, claim=past[-1].epoch))
                continue
            owned = claims.claim(folder, past[-1].epoch + 1, driver, step)
            if owned:
                return trial, owned
    replayed = study.replay(view)
    while (fresh := study.ask(view, replayed)) is not None:
        owned = claims.claim(sweep.trial_dir(fresh), 1, driver, 0)
        if owned:
            return fresh, owned
    return None


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Within the block what the run prints and logs goes to the end of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def run_slot(
    sweep: Sweep,
    cluster: ClusterProfile,
    driver: claims.Process,
    asked_to_stop: Callable[[], bool],
    silent: frozenset[Path] = frozenset(),
) -> str | None:
    """Run one trial to its end, or to a checkpoint when asked to stop; returns its signature, None where there was none to run.

    `silent` are claims of other hosts that the driver has watched for long enough to know that they are dead.
    """
    if asked_to_stop():
        return None
    view = View(sweep, silent)
    claimed = next_claim(view, driver)
    if claimed is None:
        return None
    trial, owned = claimed
    checked, wanted = 0.0, False

    def should_stop() -> bool:
        nonlocal checked, wanted
        now = time.monotonic()
        if not wanted and now - checked > _CHECK_SECONDS:
            checked, wanted = now, asked_to_stop() or owned.lost()
        return wanted

    folder = view.sweep.trial_dir(trial)
    trial.config.threads = cluster.cores_per_slot
    if not cluster.gpus_per_slot and trial.config.device is Device.auto:  # else all slots would crowd the first device
        trial.config.device = Device.cpu
    with owned, _output_to(folder / "log" / "train.log"):
        run_job(JobSpec(trial.config, cluster, folder), should_stop, owned.claim.epoch)
    return trial.signature
