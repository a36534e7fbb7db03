"""The drill of a command in any language: kill it at drawn moments, start it again, and compare what it reports."""

import contextlib
import os
import random
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import HopelessError
from jobs.command import GRACE_SECONDS, PYTHONS, STOPPED, parsed, placeholders
from jobs.resuming.check import Disturbed, Findings, Say
from jobs.resuming.kinds import Kind
from jobs.resuming.outcome import Outcome, differences
from jobs.resuming.runs import ProgramError, too_long
from jobs.resuming.unsteady import Unsteady
from jobs.resuming.watch import Moment

_POLL_SECONDS = 0.005


@dataclass
class Commands:
    """The runs of one command in one folder."""

    folder: Path
    words: Sequence[str]
    values: Mapping[str, str]
    limit_seconds: float
    count: int = 0

    def start(self, name: str, run: Path, kill: tuple[int, float, bool] | None = None, hashing: int = 0) -> tuple[Outcome, bool, str]:
        """Run the command to its end, or until it is disturbed; return its outcome, whether it was, and its last line.

        `kill` is how many reports to wait for, how many seconds more, and whether to use SIGTERM.
        Raise ProgramError at a line of reports that cannot be read, and TimeoutError if it takes too long.
        """
        self.count += 1
        base = self.folder / f"{self.count:03d}-{name}"
        base.mkdir()
        reports, log = base / "reports.jsonl", base / "output.txt"
        reports.write_bytes(b"")
        line = [string.Formatter().vformat(w, (), {**self.values, "run_dir": str(run)}) for w in self.words]
        line[0] = sys.executable if line[0] in PYTHONS else line[0]
        own = {"SWEEP_REPORT": str(reports), "SWEEP_RUN_DIR": str(run), "SWEEP_ATTEMPT": str(self.count), "PYTHONHASHSEED": str(hashing)}
        deadline = time.monotonic() + self.limit_seconds
        with open(log, "wb") as output:
            process = subprocess.Popen(
                line, env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                disturbed = kill is not None and _disturb(process, reports, kill, deadline)
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(too_long(self.limit_seconds)) from error
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        outcome = Outcome(metrics=_reports(reports))
        said = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        outcome.ended = "completed" if not process.returncode else f"exit status {process.returncode}" + f": {said}" * bool(said)
        if process.returncode == STOPPED:
            disturbed = True
        return outcome, disturbed, outcome.ended


def _disturb(process: "subprocess.Popen[bytes]", reports: Path, kill: tuple[int, float, bool], deadline: float) -> bool:
    count, more, asks = kill
    while process.poll() is None and time.monotonic() < deadline:
        if reports.read_bytes().count(b"\n") >= count:
            time.sleep(more)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM if asks else signal.SIGKILL)
            if asks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _reports(path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            epoch, values = parsed(line, "epoch")
        except HopelessError as error:
            if number == len(lines) - 1:  # cut short by a kill
                break
            raise ProgramError(str(error)) from error
        found.setdefault(epoch, {}).update(values)
    return found


def check_command(commands: Commands, kills: int, seed: int, leave_out: frozenset[str], say: Say) -> Findings:
    """Run a command undisturbed twice, then disturb it `kills` times; return what was found.

    Raise ProgramError if the undisturbed run fails, or reports fewer than two times.
    """
    found, draw = Findings(), random.Random(seed)
    began = time.monotonic()
    reference, _, ended = commands.start("undisturbed", _folder(commands, "run-undisturbed"))
    seconds = time.monotonic() - began
    if ended != "completed":
        raise ProgramError(f"an undisturbed run must end with status 0; got {ended}, see {commands.folder}")
    if len(reference.metrics) < 2:
        raise ProgramError(
            f"a command must report at least twice to the file that SWEEP_REPORT names; got {len(reference.metrics)} reports"
        )
    found.reports = len(reference.metrics)
    say(f"undisturbed: {found.reports} reports")
    again, _, _ = commands.start("again", _folder(commands, "run-again"), hashing=1)
    if wrong := differences(again, reference, leave_out):
        found.unsteady = [Unsteady(Kind.chance, wrong[0])]
        say(f"undisturbed once more: {wrong[0].text}")
    for number in range(0 if found.unsteady else kills):
        count, asks = draw.randrange(1, len(reference.metrics)), number % 2 == 1
        run = _folder(commands, f"run-disturbed-{number + 1}")
        kill = (count, draw.uniform(0, seconds / len(reference.metrics)), asks)
        first, was, ended = commands.start("killed", run, kill)
        if not was and ended != "completed":
            raise ProgramError(f"an undisturbed run must end with status 0; got {ended}, see {commands.folder}")
        disturbed = Disturbed(Moment(count, 0), asks)
        found.disturbed.append(disturbed)
        outcome, _, ended = commands.start("resumed", run)
        disturbed.failed = "" if ended == "completed" else ended
        outcome.metrics = {**first.metrics, **outcome.metrics}
        disturbed.different = [] if disturbed.failed else differences(outcome, reference, leave_out)
        shown = f"the resumed run fails: {ended}" if disturbed.failed else "the same"
        how = "asked to stop" if asks else "killed"
        say(f"{how} after report {count}: {disturbed.different[0].text if disturbed.different else shown}")
    found.runs = commands.count
    return found


def _folder(commands: Commands, name: str) -> Path:
    path = commands.folder / name
    path.mkdir(parents=True)
    return path


def words_of(command: str, overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words of a command and its values; raise ValueError at a {key} without a value, or a value without a key."""
    words = shlex.split(command)
    if not words:
        raise ValueError("--command must have at least the program; got no word")
    values = dict(o.partition("=")[::2] for o in overrides)
    keys = [key for key in placeholders(words) if key != "run_dir"]
    for key in keys:
        if key not in values:
            raise ValueError(f"--command must have a value for each {{key}}; got none for {{{key}}}: add {key}=VALUE")
    for key in values:
        if key not in keys:
            raise ValueError(f"{key}= must be a {{key}} of --command; got {command}")
    return words, values
