"""Run a worker: claim a trial, run it, write its result. Workers share only the sweep folder."""

import contextlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cnnjepa.run.attempts import attempts_with, lost, newest, numbered, publish
from cnnjepa.run.folder import RunStatus
from jobs import program, provenance
from jobs.cluster import ClusterProfile, JobSpec, fit_to
from jobs.run import run_job
from jobs.slurm.hangs import stacks_to
from jobs.slurm.nodes import NodeFaultError
from sweeps.execution.bad_nodes import Place
from sweeps.execution.scheduler import judge, next_claim, probed_at_rungs
from sweeps.state import claims, curves
from sweeps.state.folder import Sweep
from sweeps.state.history import last_command
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View, slurm_queue

_CHECK_SECONDS = 0.5
_WAIT_SECONDS = 2.0
_ASK_SLURM_SECONDS = 60.0  # long, since many workers ask


def _own_log(run: Path, attempt: int) -> Path:
    """Return the attempt's own log, which begins with what the earlier attempts printed."""
    path = run / "log" / "train.log"
    own = numbered(path, attempt)
    own.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a full disk may lose log lines
        if (earlier := newest(path)).exists() and not own.exists():
            shutil.copyfile(earlier, own)
        for number in attempts_with(path):
            if number < attempt - 1 and not lost(run, attempt):
                numbered(path, number).unlink(missing_ok=True)
    return own


@contextlib.contextmanager
def output_to(run: Path, attempt: int) -> Iterator[None]:
    """Append what the run prints and logs to log/train.log of `run` inside the `with` block.

    That name is a link to this attempt's own file. If another attempt takes over, the name moves to
    its file, and what this one still prints stays in its own.
    """
    file = open(_own_log(run, attempt), "a", buffering=1)  # noqa: SIM115, closed below
    publish(run / "log" / "train.log", attempt, run)
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk may lose log lines
                file.close()
            publish(run / "log" / "train.log", attempt, run)


def stopper(owned: claims.Ownership, asked_to_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Return a function that says whether to stop: if asked to, or if the trial is not ours."""
    checked, wanted = 0.0, False

    def should_stop() -> bool:
        nonlocal checked, wanted
        now = time.monotonic()
        if not wanted and now - checked > _CHECK_SECONDS:
            checked, wanted = now, asked_to_stop() or owned.lost()
        return wanted

    return should_stop


def run_one_trial(
    view: View,
    cluster: ClusterProfile,
    driver: str,
    asked_to_stop: Callable[[], bool],
    start: claims.SlurmStart | None = None,
    place: Place | None = None,
) -> str | None:
    """Run one trial until it ends or is asked to stop; return its run ID, or None without one.

    Raise NodeFaultError if nothing is to begin at `place`, or the trial is to run elsewhere.
    """
    if asked_to_stop():
        return None
    claimed = next_claim(view, driver, start, place)
    if claimed is None:
        return None
    trial, owned = claimed
    folder = view.sweep.trial_dir(trial)
    fit_to(cluster, trial.config, beside_others=True)
    attempt, moved_off = owned.claim.attempt, None
    if view.sweep.task.value(trial.values, "tensorboard", False):
        curves.link(view.sweep, trial)
    more: dict[str, Any] = {"spares": place.sparing(view, trial, attempt)} if place else {}
    about = provenance.of_trial(trial.overrides, last_command(view.sweep.path))
    with owned, output_to(folder, attempt), stacks_to(sys.stderr), about:
        try:
            result = run_job(
                JobSpec(probed_at_rungs(view.sweep, trial), cluster, folder),
                stopper(owned, asked_to_stop),
                attempt,
                judge(view, trial),
                **more,
            )
            if place and result is not None and result.status is not RunStatus.failed:
                place.nodes.works(place.here, owned.claim.time)
        except NodeFaultError as error:
            moved_off = error  # the trial is released, as after a stop
    if moved_off is not None:
        raise moved_off
    return trial.signature


def occupy(view: View, asked_to_stop: Callable[[], bool]) -> None:
    """Keep this worker's part of a bad node from others while trials run elsewhere."""
    while not asked_to_stop():
        view.look_again()
        if TrialState.running not in view.states().values():
            return
        time.sleep(_WAIT_SECONDS)


def run_worker(
    sweep: Sweep,
    cluster: ClusterProfile,
    driver: str,
    asked_to_stop: Callable[[], bool],
    silent: frozenset[Path] = frozenset(),
    start: claims.SlurmStart | None = None,
    nodes: int = 0,
) -> None:
    """Run one trial; in a search, one after another until none runs or can begin.

    `silent` are claims on other hosts that the driver has watched long enough to know dead. `nodes`
    is the number of nodes of the allocation.
    """
    program.use(sweep.path)
    # `next_claim` and `look_again` drop cached states themselves.
    view = View(sweep, silent, slurm_queue(sweep, _ASK_SLURM_SECONDS), remember_seconds=math.inf, thorough=False)
    place = Place.of(view, start, nodes)
    while not asked_to_stop() and view.follow():
        try:
            done = run_one_trial(view, cluster, driver, asked_to_stop, start, place)
        except NodeFaultError as error:
            print(error, flush=True)
            return occupy(view, asked_to_stop)
        if sweep.search is None:
            return
        if done is None:
            view.look_again()
            if TrialState.running not in view.states().values():
                return
            time.sleep(_WAIT_SECONDS)
