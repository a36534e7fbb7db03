"""A task that is a command in any language: started, stopped by a signal, and started again with the same folder."""

import contextlib
import dataclasses
import json
import keyword
import math
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjepa.run.attempts import attempts_with, numbered
from cnnjepa.run.folder import HopelessError
from cnnjepa.run.identity import task_name
from jobs import program
from jobs.plain import PlainTask
from jobs.plain_config import require_several
from jobs.plain_run import Run

Value = str | int | float | bool
STOPPED = 75  # exit status of a command that has saved, and goes on when it is started again: EX_TEMPFAIL of sysexits.h
GRACE_SECONDS = 60.0
_POLL_SECONDS = 0.1
PYTHONS, _SHELLS = ("python", "python3"), ("bash", "sh", "zsh")
_REPORTS = "reports.jsonl"
_OWN = ("run_dir",)  # placeholders that are no keys
_RESERVED = ("command", "task", *_OWN)


def placeholders(words: Sequence[str]) -> list[str]:
    """Return the keys in `words`, as {key}, in their order; raise ValueError at braces that hold none."""
    found: dict[str, None] = {}
    for word in words:
        try:
            parts = list(string.Formatter().parse(word))
        except ValueError as error:
            raise ValueError(f"command must have {{key}} for a value, and {{{{ for a brace; got {word}: {error}") from error
        for _, key, form, conversion in parts:
            if key is None:
                continue
            if not key.isidentifier() or form or conversion:
                raise ValueError(f"command must have a plain key in braces, as {{lr}}, and {{{{ for a brace; got {word}")
            if keyword.iskeyword(key):
                raise ValueError(f"command must have keys that are no words of Python; got {word}: write {{{key}_}}")
            found[key] = None
    return list(found)


def written(value: object) -> str:
    """Return a value as a command gets it: true and false for a bool."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind_of(values: Sequence[Value]) -> type:
    kinds = {type(value) for value in values}
    if kinds <= {bool}:
        return bool
    return str if kinds - {int, float} else float if float in kinds else int


class CommandTask(PlainTask):
    """A command as a trainer: what `SweepSpec(command=...)` makes.

    A word may hold {key} for a value of the configuration, and {run_dir} for a folder that all
    attempts at a run share. The command reports by appending lines such as
    `{"epoch": 3, "accuracy": 91.2}` to the file that SWEEP_REPORT names.
    """

    def __init__(
        self, command: Sequence[str], values: Mapping[str, Sequence[Value]], *, grace_seconds: float = GRACE_SECONDS, **about: Any
    ) -> None:
        """Take the command, and for each key its values, the default first.

        `grace_seconds` is how long a command may take to save after SIGTERM, before SIGKILL. `about`
        is what tables need to know, as for PlainTask. Raise ValueError at a key without a value, or a
        value without a key.
        """
        require_several(command=command)
        self.words = [str(word) for word in command]
        if not self.words:
            raise ValueError("command must have at least the program; got no word")
        if isinstance(grace_seconds, bool) or not isinstance(grace_seconds, (int, float)) or not 0 <= grace_seconds < math.inf:
            raise ValueError(f"grace_seconds must be a number of seconds, at least 0; got {grace_seconds!r}")
        keys = [key for key in placeholders(self.words) if key not in _OWN]
        if taken := sorted(set(_RESERVED) & values.keys()):
            raise ValueError(f"configurations must leave {taken[0]} to the launcher; got a value for it")
        known = {"seed": [42], **values}
        for key in keys:
            if key not in known:
                rule = "have a value for each {key}, in configurations, in the space or in defaults"
                raise ValueError(f"command must {rule}; got {{{key}}} without one: the keys are {', '.join([*known, *_OWN])}")
        for key in values:
            if key not in keys:
                raise ValueError(f"command must use each value that is swept; got no {{{key}}} in {shlex.join(self.words)}")
        self.grace_seconds, self._seeded = grace_seconds, "seed" in keys
        fields = [(key, _kind_of(known[key]), dataclasses.field(default=_kind_of(known[key])(known[key][0]))) for key in known]
        kind = dataclasses.make_dataclass("Config", [*fields, ("command", str, dataclasses.field(default=shlex.join(self.words)))])
        super().__init__(kind, self._run, validate=self._check, **about)

    @property
    def module(self) -> str:
        """Return the module that the command runs as `python -m`, or ""."""
        is_module = "-m" in self.words[:-1] and self.words[0] in PYTHONS
        return self.words[self.words.index("-m") + 1] if is_module else ""

    def program_words(self, root: Path) -> list[tuple[Path, Path]]:
        """Return the files of the program that the command names, relative to `root`, and the folder that each imports from."""
        found = [root / word for word in self.words if not placeholders([word]) and os.path.isfile(root / word)]  # of a long text too
        return [*((path, path.parent) for path in found), *((path, root) for path in program.modules_of(self.module, root) if self.module)]

    def check_program(self, root: Path) -> None:
        """Raise ValueError if the program, or the script that it is to run, is not there."""
        first = self.words[0]
        if first not in PYTHONS and not os.path.isfile(root / first) and shutil.which(first) is None:
            raise ValueError(f"command must begin with a program that is there; got {first}, which is neither in {root} nor on the PATH")
        if os.path.isfile(root / first) and "/" in first and not os.access(root / first, os.X_OK):
            raise ValueError(f"command must begin with a program that can be run; got {first}: chmod +x {root / first}")
        script = self.words[1] if first in (*PYTHONS, *_SHELLS) and len(self.words) > 1 else ""
        if script and not script.startswith("-") and not placeholders([script]) and not os.path.isfile(root / script):
            raise ValueError(f"command must name a script that is there; got {script}, which is not in {root}")

    def check_seeds(self, seeds: int) -> None:
        """Raise ValueError if runs of `seeds` seeds would be equal."""
        if seeds > 1 and not self._seeded:
            raise ValueError(f"command must use {{seed}} where there is more than one; got {seeds} seeds for {shlex.join(self.words)}")

    def _check(self, config: Any) -> None:
        for field in dataclasses.fields(config):
            if isinstance(value := getattr(config, field.name), str) and "\0" in value:
                raise ValueError(f"{field.name} must be a text that a command can be given; got {value!r}")

    def validate(self, config: Any, ranks: int = 1) -> None:
        """Raise ValueError with key, rule and value if `config` cannot be run."""
        if ranks > 1:
            raise ValueError(f"cluster.ranks_per_trial must be 1 for a command, which may start its own, as torchrun does; got {ranks}")
        super().validate(config, ranks)

    def line(self, config: Any, folder: Path, copy: Path, root: Path) -> list[str]:
        """Return the words to start, with the program's files in their copy."""
        values = {field.name: written(getattr(config, field.name)) for field in dataclasses.fields(config)}
        values["run_dir"] = str(folder)
        own = {os.path.normpath(path): str(copy / path.relative_to(root)) for path, _ in self.program_words(root)} if copy != root else {}
        words = []
        for word in self.words:
            path = os.path.normpath(root / word)
            words.append(own.get(path) or string.Formatter().vformat(word, (), values))
        if words[0] in PYTHONS:
            words[0] = sys.executable
        return words

    def _run(self, config: Any, run: Run) -> None:
        sweep = run.run_folder.shared
        root = copy = program.folder_of(task_name(config))
        if sweep is not None and (known := program.read(sweep)) is not None:
            root = Path(known.root)
        if not root.is_dir():
            raise HopelessError(f"the folder of the program must be there, since it runs in it; got no {root}")
        _take_left(run)
        at, line = -1, self.line(config, run.folder, copy, root)
        while True:
            ended = _Started(line, root, run, copy if self.module else None).wait(self.grace_seconds)
            if run.pruned or run.asked_to_stop:
                run.log.warning("the command was asked to stop: %s", ended)
                return
            if not goes_on(ended, run.step, at, f"see {run.run_folder.logs / 'train.log'}"):
                return
            at = run.step
            run.log.warning("the command stopped by itself at %d, %s: starting it again", run.step, ended)
            run.rewind()


def goes_on(ended: str, reached: int, before: int, see: str) -> bool:
    """Return whether a command that ended unasked is to be started again; False if it has completed.

    `ended` is `exit 3` or `signal 9`; `before` is where the command was when it last stopped by itself, and
    `reached` where it is now. Raise HopelessError, which ends in `see`, where it has failed.
    """
    if ended == "exit 0":
        return False
    if ended != f"exit {STOPPED}" and not ended.startswith("signal"):
        raise HopelessError(f"the command must end with status 0; got {ended}: {see}")
    if reached <= before:
        raise HopelessError(f"the command must gain an epoch before it stops by itself; got {ended} twice at {reached}: {see}")
    return True


def _take_left(run: Run) -> None:
    """Record reports of earlier attempts that were not read: the command may have saved since, and does not report them again."""
    path = run.run_folder.path / _REPORTS
    for number in sorted({*attempts_with(path), 0}):
        if number > run.attempt or not numbered(path, number).exists():
            continue
        known = max(map(float, run.run_folder.probes()), default=-1.0)
        for line in numbered(path, number).read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(HopelessError, ValueError):  # that attempt has failed, or was killed as it wrote
                epoch, values = parsed(line, run.position)
                if epoch > known:
                    run.report(epoch, **values)
        run.rewind()


def parsed(line: bytes, position: str) -> tuple[int, dict[str, Any]]:
    """Return epoch and metrics of a line of reports; raise HopelessError if it holds none.

    Of "epoch" and "step", the one called `position` says how far the run is where a line has both.
    """
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    found = {key: values.pop(key) for key in ("epoch", "step") if key in values} if isinstance(values, dict) else {}
    epoch = found.get(position, next(iter(found.values()), None))
    if type(epoch) is not int:
        rule = 'be a JSON object with a whole "epoch" or "step", and numbers'
        raise HopelessError(f"each line of SWEEP_REPORT must {rule}; got {line[:200].decode(errors='replace')!r}")
    return epoch, values or {}


class _Started:
    """A command that runs."""

    def __init__(self, words: list[str], cwd: Path, run: Run, imports: Path | None) -> None:
        """Start it in `cwd`; with `imports`, Python looks for modules there first, and nowhere in `cwd`."""
        self._run, self._read, self._rest = run, 0, b""
        self._reports = numbered(run.run_folder.path / _REPORTS, run.attempt)
        self._reports.write_bytes(b"")
        environment = {
            **os.environ,
            "SWEEP_REPORT": str(self._reports),
            "SWEEP_RUN_DIR": str(run.folder),
            "SWEEP_ATTEMPT": str(run.attempt),
        }
        if imports is not None:
            known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
            environment |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(imports), *known])}
        life, self._lifeline = os.pipe()
        self._status, status = os.pipe()
        guard = [sys.executable, "-S", "-E", str(Path(__file__).with_name("guard.py")), str(life), str(status), *words]
        sys.stdout.flush()
        self._process = subprocess.Popen(
            guard, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=_descriptor(), stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=(life, status),
        )  # fmt: skip
        os.close(life)
        os.close(status)

    def wait(self, grace_seconds: float) -> str:
        """Return how the command ended, `exit 3` or `signal 9`, once all that it started has; record what it reports."""
        deadline = None
        try:
            while self._process.poll() is None:
                self._take_reports()
                if deadline is None and self._run.should_stop:
                    self._signal(signal.SIGTERM)
                    deadline = time.monotonic() + grace_seconds
                if deadline is not None and time.monotonic() > deadline:
                    self._run.log.warning("the command did not end within %.0f s of SIGTERM: SIGKILL", grace_seconds)
                    self._signal(signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_POLL_SECONDS)
            self._take_reports(last=True)
            return os.read(self._status, 64).decode() or f"signal {-self._process.returncode}"
        finally:
            self._signal(signal.SIGKILL)  # none of it outlives this
            self._process.wait()
            os.close(self._lifeline)
            os.close(self._status)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _take_reports(self, last: bool = False) -> None:
        for line in self._lines(last):
            epoch, values = parsed(line, self._run.position)
            try:
                self._run.report(epoch, **values)
            except ValueError as error:
                raise HopelessError(f"SWEEP_REPORT: {error}") from error

    def _lines(self, last: bool) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), open(self._reports, "rb") as file:
            file.seek(self._read)
            *lines, self._rest = (self._rest + file.read()).split(b"\n")
            self._read = file.tell()
            if last and self._rest:
                lines, self._rest = [*lines, self._rest], b""
            yield from (line for line in lines if line.strip())


def _descriptor() -> int | None:
    """Return the file that takes what the run prints."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return sys.stdout.fileno()
    return None
