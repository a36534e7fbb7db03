"""Plants the bugs of tests/mutants.toml one at a time, runs the tests chosen for each, and prints the bugs that no test caught.

python tests/mutants.py [--only TEXT] [--jobs 2] [--json]

A bug is caught when one of its tests fails. That says something only where the same tests pass without it, so these run first.
All of it happens in copies of the checkout. Each run is forked from this process, which has loaded the large libraries, and
nothing of the checkout.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIST = "tests/mutants.toml"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "runs", "outputs", "multirun")
_STOPS = {signal.SIGINT, signal.SIGTERM}
_ERRORS = {96: "a file of tests cannot be imported", 97: "modules come from elsewhere", 98: "pytest broke"}  # beside pytest's own


@dataclass(frozen=True)
class Mutant:
    """One bug: `old`, which occurs exactly once in `file`, becomes `new`, and one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def refusal(self, root: Path) -> str:
        """Why the bug cannot be planted in `root`; "" where it can."""
        path = root / self.file
        times = path.read_text().count(self.old) if path.is_file() else 0
        return "" if times == 1 and self.old != self.new else f"does not apply: its text occurs {times} times in {self.file}"


@dataclass
class Run:
    """One run of pytest in a copy: `tests` with `mutant` planted, or with none."""

    name: str
    tests: list[str]
    limit: float = 3600.0
    mutant: Mutant | None = None
    original: str = ""
    pid: int = 0
    began: float = 0.0
    seconds: float = 0.0
    status: int | None = None  # None: it was still running at its limit
    output: str = ""

    def verdict(self) -> str:
        """What became of the bug."""
        if self.status is None:
            return f"caught: still running after {self.seconds:.0f} s"
        return {0: "survived", 1: "caught"}.get(self.status) or f"error: {_ERRORS.get(self.status, f'status {self.status}')}"


class Collected:
    """A pytest plugin, since with -x a file of tests that cannot be imported ends in the same status as a test that fails."""

    failed = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed = self.failed or report.failed


def read(root: Path) -> tuple[list[str], list[Mutant]]:
    """The libraries to load once, and the bugs."""
    listed = tomllib.loads((root / LIST).read_text())
    return listed.get("preload", []), [Mutant(**entry) for entry in listed.get("mutant", [])]


def _in_the_child(root: Path, home: Path, tests: list[str]) -> int:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    output = os.open(home.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(target, stream)
    os.chdir(home)
    # No .pyc: two versions of a file that have the same length and the same second share one.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [str(home), *(p for p in sys.path if Path(p).resolve() not in (root, ROOT, ROOT / "tests"))]
    sys.modules["__main__"] = ModuleType("__main__")  # what multiprocessing spawns would load this file
    plugin = Collected()
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", f"--basetemp={home.parent / 'temporary'}"]
    status = int(pytest.main([*options, *tests], plugins=[plugin]))
    packages = {path.parent.name for path in home.glob("*/__init__.py")}
    files = [str(m.__file__) for name, m in sys.modules.items() if name.split(".")[0] in packages and getattr(m, "__file__", None)]
    strangers = [file for file in files if not Path(file).is_relative_to(home)]
    print(*strangers, sep="\n")
    return 96 if plugin.failed else 97 if strangers else status


def _begin(root: Path, home: Path, run: Run) -> None:
    if run.mutant is not None:
        run.original = (home / run.mutant.file).read_text()
        (home / run.mutant.file).write_text(run.original.replace(run.mutant.old, run.mutant.new))
    sys.stdout.flush()
    run.began = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # else a stop could come before it is known who has to be ended
    run.pid = os.fork()
    if run.pid == 0:
        status = 98
        try:
            status = _in_the_child(root, home, run.tests)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _stop(pid: int) -> None:
    """Kill a child that has not been waited for, and what it started."""
    with suppress(psutil.NoSuchProcess, ChildProcessError):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.waitpid(pid, 0)


def _ended(home: Path, run: Run) -> bool:
    """Whether the run is over; the file that held the bug is then as it was."""
    run.seconds = time.monotonic() - run.began
    pid, status = os.waitpid(run.pid, os.WNOHANG)
    if pid == 0 and run.seconds < run.limit:
        return False
    if pid == 0:
        _stop(run.pid)
    with suppress(ProcessLookupError):  # what a failed test left running
        os.killpg(run.pid, signal.SIGKILL)
    run.status = os.waitstatus_to_exitcode(status) if pid else None
    run.output = (home.parent / "output").read_text(errors="replace")
    if run.mutant is not None:
        (home / run.mutant.file).write_text(run.original)
    return True


def carry_out(root: Path, runs: list[Run], copies: list[Path], report: Callable[[Run], None]) -> None:
    """All runs, as many at a time as there are copies."""
    waiting, running = runs[::-1], dict[Path, Run]()
    try:
        while waiting or running:
            for home in copies:
                if home in running and _ended(home, running[home]):
                    report(running.pop(home))
                if home not in running and waiting:
                    running[home] = waiting.pop()
                    _begin(root, home, running[home])
            time.sleep(0.05)
    finally:
        for run in running.values():
            if run.pid:
                _stop(run.pid)


def without_bugs(mutants: list[Mutant]) -> list[Run]:
    """All tests that are chosen for some bug, a run for each file of tests."""
    chosen = {test for m in mutants for test in m.tests}
    files = sorted({test.split("::")[0] for test in chosen})
    return [Run(f, [f] if f in chosen else sorted(t for t in chosen if t.split("::")[0] == f)) for f in files]


def main(words: list[str]) -> int:
    """Exit status 0 when every bug was caught, else 1."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only bugs with this text in their name, file or tests")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds beyond five times what the tests take without a bug")
    options = parser.parse_args(words)
    root, began, verdicts = options.root.resolve(), time.monotonic(), dict[str, tuple[str, float]]()
    say = (lambda *_, **__: None) if options.json else print
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the `finally` that ends what runs
    libraries, mutants = read(root)
    mutants = [m for m in mutants if any(options.only in text for text in (m.name, m.file, *m.tests))]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for library in libraries:
        importlib.import_module(library)

    def report(name: str, what: str, seconds: float = 0.0, output: str = "") -> None:
        verdicts[name] = (what, round(seconds, 1))
        say(f"{seconds:6.1f} s  {name}: {what}", *(output.splitlines()[-20:] if "error" in what else []), sep="\n    ", flush=True)

    def report_clean(run: Run) -> None:
        lines = run.output.splitlines()[-30:] if run.status != 0 else []
        say(f"{run.seconds:6.1f} s  {run.name} without a bug: {'FAILED' if lines else 'passed'}", *lines, sep="\n    ", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Path(folder) / str(job) / "checkout" for job in range(max(1, options.jobs))]
        for home in copies:
            shutil.copytree(root, home, ignore=_LEFT_OUT, symlinks=True)
        clean = {run.name: run for run in without_bugs(mutants)}
        carry_out(root, list(clean.values()), copies, report_clean)
        runs = []
        for m in mutants:
            files = {test.split("::")[0] for test in m.tests}
            if refusal := m.refusal(root):
                report(m.name, refusal)
            elif broken := sorted(f for f in files if clean[f].status != 0):
                report(m.name, f"error: without it {' '.join(broken)} fails")
            else:
                runs.append(Run(m.name, m.tests, options.patience + 5 * sum(clean[f].seconds for f in files), m))
        carry_out(root, runs, copies, lambda run: report(run.name, run.verdict(), run.seconds, run.output))
    failures = [f"{name}: {what}" for name, (what, _) in verdicts.items() if not what.startswith("caught")]
    seconds, caught = round(time.monotonic() - began), len(verdicts) - len(failures)
    say("", *failures, f"{caught} of {len(verdicts)} bugs caught in {seconds} s", sep="\n")
    if options.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(), "python": platform.python_version()}
        figures = {"caught": caught, "failures": failures, "seconds": seconds, "verdicts": verdicts}
        print(json.dumps({"machine": machine, "command": shlex.join(["python", *sys.argv]), "n": len(verdicts), "figures": figures}))
    return int(bool(failures) or not verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
