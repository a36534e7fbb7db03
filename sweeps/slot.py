"""A slot: claim a trial, run it, write its result, return. Slots share nothing but the sweep folder."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnnjepa.config import Device
from cnnjepa.identity import signature
from cnnjepa.runs import RunResult, RunStatus
from jobs.run import run_job
from jobs.spec import ClusterProfile, JobSpec, fit_to
from sweeps import claims, study
from sweeps.folder import Sweep, TrialState, View
from sweeps.slot_log import log_tail
from sweeps.spec import Trial

# The fault is the trial's own when its process has died so often in place; a machine's hiccup gets a second chance.
CRASHES_ALLOWED = 2
# Jobs that Slurm ended (preemption, node loss, time limit) are no fault, but so many that gain no step will never gain one.
STARTS_ALLOWED = 10
_CHECK_SECONDS = 0.5


def fault(view: View, trial: Trial, past: list[claims.Claim], step: int, driver: str) -> str:
    """Why a half-done trial shall not be started again, "" where it shall."""
    folder, last = view.sweep.trial_dir(trial), past[-1]
    log = Path(last.slurm.log) if last.slurm else folder / "log" / "train.log"
    if claims.crashes_in_place(past, step, driver, folder) >= CRASHES_ALLOWED:
        return f"its process died {CRASHES_ALLOWED} times at step {step} without gaining a step: {log_tail(log)}; see {log}"
    if claims.starts_in_vain(past, step, folder) >= STARTS_ALLOWED:
        return f"{STARTS_ALLOWED} jobs gained no step over step {step}, is the time limit too short? {log_tail(log)}; see {log}"
    return ""


def runnable(trial: Trial) -> bool:
    """Whether this code trains the trial as its signature says; one of a later version is left to later code."""
    try:
        return signature(trial.config) == trial.signature
    except (ValueError, TypeError, KeyError):
        return False


def next_claim(view: View, driver: str, start: claims.SlurmStart | None = None) -> tuple[Trial, claims.Ownership] | None:
    """A trial that is now ours: a half-done one whose owner is gone before a new one of the study; None where nothing is left to begin.

    A job that was requeued finds its own trial first. A trial with a `fault` is recorded as failed instead.
    """
    sweep = view.sweep
    half_done = [(view.claims(t), t) for t in sweep.trials if view.state(t) is TrialState.interrupted and runnable(t)]
    mine = start.job if start else ""
    for past, trial in sorted(half_done, key=lambda found: not (found[0][-1].slurm and found[0][-1].slurm.job == mine)):
        folder, step = sweep.trial_dir(trial), view.reached_step(trial)
        cause = fault(view, trial, past, step, driver)
        if cause:
            sweep.run(trial).write_result(RunResult(RunStatus.failed, cause, step=step, claim=past[-1].epoch))
            if mine and past[-1].slurm and past[-1].slurm.job == mine:
                return None  # should the fault be this node's, the next trial is not tried on it too
            continue
        owned = claims.claim(folder, past[-1].epoch + 1, driver, step, start)
        if owned:
            return trial, owned
    replayed = study.replay(view)
    while (fresh := study.ask(view, replayed)) is not None:
        owned = claims.claim(sweep.trial_dir(fresh), 1, driver, 0, start) if runnable(fresh) else None
        if owned and claims.is_cancelled(sweep.trial_dir(fresh)):  # while the study was replayed
            with owned:
                continue
        if owned:
            return fresh, owned
    return None


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
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
    sweep: Sweep,
    cluster: ClusterProfile,
    driver: str,
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
    folder = view.sweep.trial_dir(trial)
    fit_to(cluster, trial.config)
    if not cluster.gpus_per_slot and trial.config.device is Device.auto:  # else all slots would crowd the first device
        trial.config.device = Device.cpu
    with owned, output_to(folder / "log" / "train.log"):
        run_job(JobSpec(trial.config, cluster, folder), stopper(owned, asked_to_stop), owned.claim.epoch)
    return trial.signature
