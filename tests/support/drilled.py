"""Drill the programs of tests/support/forgetting.py, in forks of a process that has imported torch and nothing of this project."""

import atexit
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.resuming.check import Findings, check
from jobs.resuming.runs import Runs
from tests.support.forgetting import OWN, Program
from tests.support.forked import ForkServer
from tests.support.tiny import OVERRIDES

_MODULES = ("torch", "torch._dynamo", "torch.optim.swa_utils", "torch.distributed", "torchvision", "sklearn.datasets", "hydra", "yaml")
# The folder of the program comes first: a program may be a changed copy of this project's own trainer.
_BOOT = """
import os, runpy, sys
sys.path[:0] = reversed(os.environ["PYTHONPATH"].split(os.pathsep)[:2])
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_servers: list[ForkServer] = []


def start(words: Sequence[str], environment: Mapping[str, str], limit_seconds: float) -> tuple[int, str]:
    """Do what `jobs.resuming.runs.start_python` does, by a fork."""
    if not _servers or _servers[0]._owner != os.getpid():
        _servers[:] = [ForkServer(modules=_MODULES)]
        atexit.register(_servers[0].close)
    done = _servers[0].run(["-c", _BOOT, *words[1:]], env=environment, timeout=limit_seconds)
    return done.returncode, done.stdout + done.stderr


def drilled(program: Program, folder: Path, kills: int = 1, seed: int = 1) -> Findings:
    """Drill a program in `folder`."""
    (source := folder / "program").mkdir()
    module = program.write(source)
    own = program.base == OWN
    overrides = ["data=digits", *OVERRIDES] if own else []
    runs = Runs(folder / "runs", module if own else f"{module}:TASK", overrides, [str(source)], start, 240)
    return check(runs, kills, seed, frozenset(), print)
