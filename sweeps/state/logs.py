"""Read what a worker printed, without importing torch, for causes of failure and `logs`."""

import re
import sys
import time
from pathlib import Path

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import tail
from jobs.cli import printable
from sweeps.spec.sweep import Trial
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_FOLLOW_SECONDS = 1.0

_TAIL_BYTES, _TAIL_LINES, _LINE_CHARACTERS = 100_000, 2, 160  # tracebacks of four ranks take 20 kB
_KILLED = re.compile(r"srun: error: .*task.*: (Killed|Aborted|Segmentation|Bus error|Out Of Memory)", re.I)
_ERROR = re.compile(r"(Error|Exception|error): |giving up")
_AFTERMATH = re.compile(
    r"supervisor: .*again in place|slurmstepd-|srun: (launch|Force|Job step|forcing|error: .*(Exited|Terminated))|saving a checkpoint"
)


def log_tail(path: Path) -> str:
    """Return the end of a log in one line, kills and errors first, or "" if there is no log."""
    try:
        text = tail(path, _TAIL_BYTES).decode(errors="replace")
    except OSError:  # no file, or no access to it
        return ""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    killed = [line for line in lines if _KILLED.search(line)][-1:]
    shown = [line for line in lines if not _AFTERMATH.search(line) and not _KILLED.search(line)]
    shown = [line for line in shown if _ERROR.search(line)] or shown or lines
    return " | ".join(line[:_LINE_CHARACTERS] for line in killed + shown[-_TAIL_LINES:])


def follow(view: View, trial: Trial | None, keep_on: bool) -> int:
    """Print the log of `trial`, by default a running one; return 1 if no trial has begun, else 0.

    With `keep_on`, follow the log until the trial is settled.
    """
    sweep = view.sweep
    states = view.states()
    if trial is None:
        order = [TrialState.running, TrialState.requeued, TrialState.interrupted, TrialState.failed, TrialState.completed]
        order.append(TrialState.damaged)
        begun = [t for state in order for t in sweep.trials if states[t.signature] is state]
        if not begun:
            print("no trial has started", file=sys.stderr)
            return 1
        trial = begun[0]
    path, past = sweep.trial_dir(trial) / "log" / "train.log", view.claims(trial)
    print(printable(f"{trial.name}: {view.damage(trial) or view.state(trial).name}: {path}"))
    if past and past[-1].slurm:
        print(printable(f"job {past[-1].slurm.job} on {past[-1].slurm.node}: {past[-1].slurm.output(sweep.path)}"))
    position = 0
    while True:
        settled = view.state(trial).settled
        if (found := newest(path)).exists():
            with open(found, errors="replace") as file:
                file.seek(position)
                print(printable(file.read(), keep="\n\t"), end="", flush=True)
                position = file.tell()
        if settled or not keep_on:
            return 0
        time.sleep(_FOLLOW_SECONDS)
