"""Compare the files of a user's program with those that the trials of a sweep began with, and let a person choose."""

import argparse
import os
import shlex
import sys
from dataclasses import replace

from rich.console import Console

from jobs import program
from jobs.program import Program
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_WHAT_TO_DO = "--keep keeps them and goes on with the files as they are now; --rerun runs them again from the start"
_QUESTION = "keep them (k), run them again from the start (r), or leave (any other key)? "


def settle(sweep: Sweep, view: View, asked: argparse.Namespace, console: Console) -> None:
    """Say which files changed since trials ended or began, and keep these trials or set them aside, as the user chooses.

    Raise ValueError if the user has chosen neither. Without a change, do nothing.
    """
    if asked.keep and asked.rerun:
        raise ValueError("--keep must be left out with --rerun; got both")
    now, before = program.find(sweep.task.name), program.read(sweep.path)
    if now is None or before is None or not (other := _begun_with_others(view, asked, now, before)):
        return
    line = _line(view, other, now)
    if asked.dry_run:
        console.print(f"{line}: {_WHAT_TO_DO}", highlight=False, soft_wrap=True)
        return
    choice = "k" if asked.keep else "r" if asked.rerun else ""
    if not choice and sys.stdin.isatty() and not getattr(asked, "embedded", False):
        choice = input(f"{line}: {_QUESTION}").strip().lower()
    if choice == "k":
        program.keep(sweep.path, replace(now, kept=sorted({*before.kept, *(begun.digest for begun in other.values())})))
        console.print(f"{line}: they are kept", highlight=False, soft_wrap=True)
    elif choice == "r":
        again = [trial for trial in sweep.trials if trial.signature in other]
        for trial in again:
            _require_at_rest(sweep, trial, view)
        for trial in again:
            _set_aside(sweep, trial)
        console.print(f"{line}: they run again; what there was is in {sweep.path / 'replaced'}", highlight=False, soft_wrap=True)
    else:
        raise ValueError(f"{line}: {_WHAT_TO_DO}")


def _begun_with_others(view: View, asked: argparse.Namespace, now: Program, before: Program) -> dict[str, Program]:
    """Return the trials, by run ID, that ended or began with other files, with these; a failed one only if it is to go on."""
    found, kept = {}, before.kept if before.digest == now.digest else ()  # another change asks again
    for trial in view.sweep.trials:
        begun = program.noted(view.sweep.trial_dir(trial))
        if begun is None or begun.digest == now.digest or begun.digest in kept:
            continue
        if view.state(trial) is not TrialState.failed or asked.retry_failed:
            found[trial.signature] = begun
    return found


def _line(view: View, other: dict[str, Program], now: Program) -> str:
    files = sorted({name for begun in other.values() for name in now.changed_from(begun)})
    states = [view.state(trial) for trial in view.sweep.trials if trial.signature in other]
    ended = sum(state.ended for state in states)
    counts = [f"{n} trial{'s' * (n != 1)} {what}" for n, what in ((ended, "ended"), (len(states) - ended, "began")) if n]
    return f"{', '.join(files)} changed since {' and '.join(counts)}"


def _require_at_rest(sweep: Sweep, trial: Trial, view: View) -> None:
    """Raise ValueError if the trial runs or its job waits."""
    state = view.state(trial)
    if not state.ended and state not in (TrialState.interrupted, TrialState.waiting, TrialState.cancelled):
        rule = "wait until none of the trials runs or has a job that waits"
        got = f"{trial.name}, {state.name}"
        raise ValueError(f"--rerun must {rule}; got {got}: python -m sweeps cancel {shlex.quote(str(sweep.path))}")


def _set_aside(sweep: Sweep, trial: Trial) -> None:
    """Move the folder of a trial out of the way."""
    folder = sweep.path / "replaced"
    folder.mkdir(exist_ok=True)
    number = 1 + sum(path.name.startswith(f"{trial.signature}-") for path in folder.iterdir())
    os.rename(sweep.trial_dir(trial), folder / f"{trial.signature}-{number}")
