"""Damage the files of a small sweep folder at random, and judge what every command then says and does."""

import csv
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run import checkpoint
from cnnjepa.run.files import SEAL
from sweeps import __main__ as readers
from sweeps.cli import run as command
from sweeps.state import claims
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from tests.support import fault_target
from tests.support.fault_target import SPECS, folder, given, make_quick, planned

READERS = ("status", "results", "report", "logs", "advice", "study")
ACTIONS = ("flip", "truncate", "delete", "type", "folder")
DERIVED = ("results.csv", "summary.csv", "ablation.png", "report.html", "optuna.journal", "accuracy_against_cost.png")
_LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Damage:
    """One damage: of which sweep, to which kind of file, in which way, with which seed."""

    sweep: str
    kind: str
    action: str
    seed: int

    def __str__(self) -> str:
        return f"{self.sweep}: {self.action} {self.kind}, seed {self.seed}"


@dataclass
class Found:
    """What one damage came to: nothing, if the lists are empty."""

    damage: Damage
    what: str  # file, and what was done to it
    tracebacks: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # tables that differ, and nothing says so
    not_ended: list[str] = field(default_factory=list)  # undamaged trials that the command left
    named: bool = False  # some command said that something is damaged

    @property
    def faults(self) -> list[str]:
        return [f"{name}: {text}" for name in ("tracebacks", "loops", "silent", "not_ended") for text in getattr(self, name)]


def kind_of(path: Path, root: Path) -> str:
    """trials/<run ID>/claim/000001.json -> trials/*/claim/*.json"""
    parts = path.relative_to(root).parts
    stem = "*" if path.stem[:1].isdigit() or path.suffix == ".pt" else path.stem
    named = parts[:1] + ("*",) * (len(parts) > 2) + parts[2:-1] if parts[0] == "trials" else parts[:-1]
    return "/".join([*named, stem + path.suffix])


def files_of(root: Path) -> list[Path]:
    """All files that are not derived; of runs without files of code."""
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name not in DERIVED and "code" not in p.relative_to(root).parts)


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fault_target.ARGUMENTS, "sweep", ("--seeds", "2"))
    fresh = functools.cache(planned.__wrapped__)  # what was planned with other arguments is not of these, nor these of later tests
    for module in (fault_target, sys.modules[__name__]):
        monkeypatch.setattr(module, "planned", fresh)
    # Slurm's clients may be here without a controller: a command rightly waits for its answer about a trial of one of its jobs.
    monkeypatch.setattr("sweeps.state.view.has_slurm", lambda: False)
    make_quick(monkeypatch)


def own(name: str, runs: Path) -> Callable[[], int]:
    """The sweep's own command, from its command line on."""

    def work() -> int:
        sys.argv = [f"sweeps/{name}.py", "--runs-dir", str(runs), *given(name, "local")]
        with pytest.raises(SystemExit) as end:
            command.main(SPECS[name])
        return int(end.value.code or 0)

    return work


def reader(name: str, path: Path) -> Callable[[], int]:
    def work() -> int:
        more = {"results": ["--format", "csv"], "logs": ["0", "--no-follow"]}.get(name, [])
        sys.argv = ["sweeps", name, str(path), *more]
        return readers.main()

    return work


def finished(name: str, runs: Path) -> Path:
    """A sweep folder whose trials have all ended, with what Slurm leaves in one."""
    runs.mkdir(parents=True)
    status, said = in_child(own(name, runs), runs / "said")
    assert status == 0, said
    path = folder(name, runs)
    sweep = Sweep.load(path)
    start = SlurmStart("mini", "7_0", 0, "gpu01", 1.0, str(path / "log" / "7_0.log"), "/code")
    first, trial_dir = sweep.run(sweep.trials[0]), sweep.trial_dir(sweep.trials[0])
    result = first.result() or pytest.fail("no result")
    with claims.claim(trial_dir, 2, "d", checkpoint.find(trial_dir / "checkpoints")[0].step, start) or pytest.fail("taken"):
        first.amend_result(replace(result, claim=2))
    cluster = planned(name, "local")[1]
    for number in (1, 2):
        made = Submission(path, number, f"x-{number}", 2, 1, [], cluster, "/code", Process.me(), time.time())
        assert made.create()
        made.write_job(str(6 + number))
    (path / "log").mkdir()
    (path / "log" / "7_0.log").write_text("began\nended\n")
    for trial in sweep.trials:
        (sweep.trial_dir(trial) / "log" / "train.log").write_text("step 1\nstep 2\n")
    return path


def bases(root: Path) -> dict[str, Path]:
    """A finished sweep, the same with two trials to run, and a finished search."""
    made = {name: finished(name, root / name) for name in SPECS}
    shutil.copytree(root / "sweep", root / "begun")
    made["begun"] = root / "begun" / made["sweep"].name
    sweep = Sweep.load(made["begun"])
    (sweep.trial_dir(sweep.trials[-1]) / "result.json").unlink()  # it goes on from its checkpoint
    shutil.rmtree(sweep.trial_dir(sweep.trials[-2]))
    return made


def in_child(work: Callable[[], int], said: Path, limit_seconds: int = _LIMIT_SECONDS) -> tuple[int, str]:
    """Exit status and output of `work` in a fork of this process: -14 where it takes too long, 99 for a traceback."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 99
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit_seconds)
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text(errors="replace")


def kinds_of(path: Path) -> list[str]:
    return sorted({kind_of(p, path) for p in files_of(path)})


def drawn(of: dict[str, Path], count: int, seed: int) -> list[Damage]:
    """`count` damages: every kind of file in turn, in ways drawn at random."""
    draw = random.Random(seed)
    kinds = [(name, kind) for name, path in of.items() for kind in kinds_of(path)]
    draw.shuffle(kinds)
    return [Damage(*kinds[i % len(kinds)], draw.choice(ACTIONS), draw.randrange(2**32)) for i in range(count)]


_OTHERS: dict[type, Sequence[Any]] = {
    bool: ("x", [], {}, 17),
    int: ("x", [], {}, None, 1.5, True),
    float: ("x", [], {}, None, True),
    str: (17, [], {}, None, True),
    type(None): ("x", [], {}, True),
}


def _leaves(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of leaves."""
    found: list[tuple[Any, Any]] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += _leaves(inner) if isinstance(inner, (dict, list)) and inner else [(value, key)]
    return found


def _retyped(data: bytes, draw: random.Random) -> tuple[bytes, str] | None:
    """The bytes with one value of another type: in JSON without its checksum half of the time, as version 0.1 wrote it."""
    lines = data.splitlines() if data.count(b"\n{") else [data]
    at = draw.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        return None
    seal = value.pop(SEAL, None) if isinstance(value, dict) else None
    leaves = [(inside, key) for inside, key in _leaves(value) if type(inside[key]) in _OTHERS]
    if not leaves:
        return None
    inside, key = draw.choice(leaves)
    if type(inside[key]) is float and inside[key] is not None and key in ("energy_kwh", "gpu_utilisation", "data_wait_share"):
        return None
    old, inside[key] = inside[key], draw.choice(_OTHERS[type(inside[key])])
    if seal and draw.random() < 0.5:
        value[SEAL] = seal
    said = f"{key}: {old!r:.40} -> {inside[key]!r}{'' if SEAL in value else ', no checksum'}"
    return b"\n".join([*lines[:at], json.dumps(value).encode(), *lines[at + 1 :]]) + b"\n", said


def inflict(damage: Damage, root: Path) -> tuple[Path, str]:
    """Damage one file of the folder; return it and what was done."""
    draw = random.Random(damage.seed)
    path = draw.choice([p for p in files_of(root) if kind_of(p, root) == damage.kind])
    data, action = path.read_bytes(), damage.action
    if action == "type" and (made := _retyped(data, draw)) is not None:
        path.write_bytes(made[0])
        return path, made[1]
    if action in ("flip", "type", "truncate") and data:
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:at] if action == "truncate" else data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        return path, f"byte {at} of {len(data)}, {'cut' if action == 'truncate' else f'{data[at : at + 1]!r} ^ {bit}'}"
    path.unlink()
    if action == "folder":
        path.mkdir()
    return path, "a folder" if action == "folder" else "deleted"


def run_rows(path: Path) -> dict[str, dict[str, str]]:
    """run ID -> row of results.csv."""
    file = path / "results.csv"
    if not file.is_file():
        return {}
    return {row["signature"]: row for row in csv.DictReader(io.StringIO(file.read_text()))}


def judged(damage: Damage, base: Path, work: Path) -> Found:
    """Inflict a damage on a copy of `base` in `work`, and run every command on it."""
    runs = work / "runs"
    shutil.copytree(base.parent, runs)
    path = runs / base.name
    before = run_rows(base)
    for name in DERIVED:
        (path / name).unlink(missing_ok=True)
    file, done = inflict(damage, path)
    found = Found(damage, f"{file.relative_to(path)}: {done}")
    for name in READERS:
        status, said = in_child(reader(name, path), work / "said")
        _note(found, name, status, said)
        if name == "results" and status == 0:
            _compare(found, before, run_rows(path))
    status, said = in_child(own(spec_of(damage.sweep), runs), work / "said")
    _note(found, "the sweep's command", status, said)
    if status in (0, 1):
        after = run_rows(path)
        _compare(found, before, after)
        bad = {signature: row["state"] for signature, row in after.items() if row["state"] != "completed"}
        found.not_ended += [f"{signature} is {state}" for signature, state in bad.items() if state != "damaged"]
        if len(bad) > 1:
            found.not_ended.append(f"one damage cost {len(bad)} trials: {bad}")
        if bad and status == 0:
            found.silent.append("the sweep's command returns 0 without all its trials")
    shutil.rmtree(runs)
    return found


def spec_of(name: str) -> str:
    """The name of the sweep in a folder of that name."""
    return "search" if name == "search" else "sweep"


def _note(found: Found, name: str, status: int, said: str) -> None:
    if status == -signal.SIGALRM:
        found.loops.append(name)
    elif "Traceback" in said or ", a bug" in said or status not in (0, 1, 2):
        found.tracebacks.append(f"{name}: status {status}: {said[-600:]}")
    found.named = found.named or any(word in said for word in ("damaged", "error: ", "of no trial"))
    if any(not (c.isprintable() or c in "\n\t") for c in said):
        found.tracebacks.append(f"{name}: control characters")


def _compare(found: Found, before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> None:
    """Compare the rows of completed trials with those before the damage; a missing row must have been reported."""
    for signature, row in before.items():
        now = after.get(signature)
        if now is None:
            if not found.named:
                found.silent.append(f"{signature} is not in the table")
        elif now["state"] == "completed" and _lasting(now) != _lasting(row):
            changed = {k: (row[k], now.get(k)) for k in row if row[k] != now.get(k)}
            found.silent.append(f"{signature} differs: {changed}")


def _lasting(row: dict[str, str]) -> dict[str, str]:
    """A row without what a run that is repeated may change."""
    return {k: v for k, v in row.items() if k not in ("resumes", "cause", "device_hours")}
