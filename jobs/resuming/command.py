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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import HopelessError
from jobs.command import GRACE_SECONDS, PYTHONS, goes_on, parsed, placeholders
from jobs.resuming.check import Disturbed, Findings, Say
from jobs.resuming.kinds import Kind
from jobs.resuming.outcome import Outcome, differences
from jobs.resuming.runs import ProgramError, too_long
from jobs.resuming.unsteady import Unsteady
from jobs.resuming.watch import Moment

_POLL_SECONDS = 0.005
COMPLETED = "completed"


@dataclass(frozen=True)
class CommandLine:
    """A command as it is drilled."""

    words: Sequence[str]
    values: Mapping[str, str] = field(default_factory=dict)  # of each {key} but run_dir
    grace_seconds: float = GRACE_SECONDS
    position: str = "epoch"  # what says how far it is where a report has both, "epoch" or "step"


@dataclass(frozen=True)
class Kill:
    """When and how to disturb a command."""

    reports: int  # to wait for
    seconds: float  # more
    asks: bool  # with SIGTERM, and with SIGKILL only if it does not end in its grace


@dataclass
class Attempt:
    """What an attempt at a command was: as in a sweep, all its processes until it has ended or is disturbed."""

    outcome: Outcome
    disturbed: bool = False
    outlived: bool = False  # whether it did not end in its grace after SIGTERM


@dataclass
class Commands:
    """The runs of one command in one folder."""

    folder: Path
    command: CommandLine
    cwd: Path
    limit_seconds: float
    count: int = 0

    def start(self, name: str, run: Path, kill: Kill | None = None, hashing: int = 0) -> Attempt:
        """Run the command to its end, or until it is disturbed; a command that stops by itself is started again.

        Raise ProgramError at a line of reports that cannot be read, and TimeoutError if it takes too long.
        """
        self.count += 1
        base = self.folder / f"{self.count:03d}-{name}"
        base.mkdir()
        reports, log = base / "reports.jsonl", base / "output.txt"
        reports.write_bytes(b"")
        line = [string.Formatter().vformat(w, (), {**self.command.values, "run_dir": str(run)}) for w in self.command.words]
        line[0] = sys.executable if line[0] in PYTHONS else line[0]
        own = {"SWEEP_REPORT": str(reports), "SWEEP_RUN_DIR": str(run), "SWEEP_ATTEMPT": str(self.count), "PYTHONHASHSEED": str(hashing)}
        environment, deadline = {**os.environ, **own}, time.monotonic() + self.limit_seconds
        found, before = Attempt(Outcome()), -1
        while True:
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    line, cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL,
                    stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            try:
                if kill is not None:
                    self._disturb(process, reports, kill, deadline, found)
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(too_long(self.limit_seconds)) from error
            finally:
                _signal(process, signal.SIGKILL)
                process.wait()
            found.outcome.metrics = _reports(reports, self.command.position)
            ended = f"signal {-process.returncode}" if process.returncode < 0 else f"exit {process.returncode}"
            if found.disturbed:
                found.outcome.ended = ended
                return found
            reached = max(found.outcome.metrics, default=0)
            try:
                if not goes_on(ended, reached, before, " ".join(log.read_text(errors="replace").strip().splitlines()[-1:]) or "no output"):
                    found.outcome.ended = COMPLETED
                    return found
            except HopelessError as error:
                found.outcome.ended = str(error)
                return found
            before = reached

    def _disturb(self, process: "subprocess.Popen[bytes]", reports: Path, kill: Kill, deadline: float, found: Attempt) -> None:
        while process.poll() is None and time.monotonic() < deadline:
            if reports.read_bytes().count(b"\n") < kill.reports:
                time.sleep(_POLL_SECONDS)
                continue
            time.sleep(kill.seconds)
            found.disturbed = True
            _signal(process, signal.SIGTERM if kill.asks else signal.SIGKILL)
            if kill.asks and self.command.grace_seconds < deadline - time.monotonic():
                try:
                    process.wait(self.command.grace_seconds)
                except subprocess.TimeoutExpired:
                    found.outlived = True
                    _signal(process, signal.SIGKILL)
            return


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _reports(path: Path, position: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            epoch, values = parsed(line, position)
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
    reference = commands.start("undisturbed", _folder(commands, "run-undisturbed")).outcome
    seconds = time.monotonic() - began
    _require_completed(reference)
    if len(reference.metrics) < 2:
        raise ProgramError(
            f"a command must report at least twice to the file that SWEEP_REPORT names; got {len(reference.metrics)} reports"
        )
    found.reports = len(reference.metrics)
    say(f"undisturbed: {found.reports} reports")
    again = commands.start("again", _folder(commands, "run-again"), hashing=1).outcome
    _require_completed(again)
    if wrong := differences(again, reference, leave_out):
        found.unsteady = [Unsteady(Kind.chance, wrong[0])]
        say(f"undisturbed once more: {wrong[0].text}")
    for number in range(0 if found.unsteady else kills):
        count, asks = draw.randrange(1, len(reference.metrics)), number % 2 == 1
        run = _folder(commands, f"run-disturbed-{number + 1}")
        first = commands.start("killed", run, Kill(count, draw.uniform(0, seconds / len(reference.metrics)), asks))
        if not first.disturbed:  # it was faster
            _require_completed(first.outcome)
        disturbed = Disturbed(Moment(count, 0), asks)
        found.disturbed.append(disturbed)
        how = "asked to stop" if asks else "killed"
        if first.outlived:
            disturbed.outlived_seconds = commands.command.grace_seconds
            how += f", did not end within {commands.command.grace_seconds:g} s of SIGTERM, and was killed"
        outcome = commands.start("resumed", run).outcome
        disturbed.failed = "" if outcome.ended == COMPLETED else outcome.ended
        outcome.metrics = {**first.outcome.metrics, **outcome.metrics}
        disturbed.different = [] if disturbed.failed else differences(outcome, reference, leave_out)
        shown = f"the resumed run fails: {disturbed.failed}" if disturbed.failed else "the same"
        say(f"{how} after report {count}: {disturbed.different[0].text if disturbed.different else shown}")
    found.runs = commands.count
    return found


def _require_completed(undisturbed: Outcome) -> None:
    if undisturbed.ended != COMPLETED:
        raise ProgramError(f"an undisturbed run must complete; got a failure: {undisturbed.ended}")


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
