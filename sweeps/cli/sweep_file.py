"""Find the sweep of a file, or of a name that a package offers, and run its command line."""

import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil

from cnnjepa.run import identity
from cnnjepa.run.command_line import did_you_mean
from cnnjepa.run.console import SWEEPS, foreign, offered
from jobs import own_code, program
from jobs.cli import line_of, resolved
from jobs.task import task_named
from sweeps.cli.run import run
from sweeps.spec.sweep import SweepSpec

_SHIPPED = Path(__file__).resolve().parents[1]


def run_file(named: str, arguments: Sequence[str]) -> int:
    """Run the command line of the sweep that `named` gives; return the exit status.

    Raise ValueError at wrong usage.
    """
    spec = spec_of(named).resolved(Path(named).stem)
    words = [Path(sys.argv[0]).stem] if Path(sys.argv[0]).stem.startswith("cnnjepa-") else ["python", "-m", "sweeps"]
    return run(spec, arguments, psutil.Process().create_time(), shlex.join([*words, "run", named]))


def names() -> dict[str, str]:
    """Return the sweeps that need no path, modules by name: those shipped and those of other packages."""
    found = {path.stem: f"sweeps.{path.stem}" for path in sorted(_SHIPPED.glob("[!_]*.py"))}
    for point in offered(SWEEPS):
        if found.get(point.name, point.value) != point.value:
            rule = f"have a name of its own; got {point.name} = {point.value} beside {found[point.name]}"
            raise ValueError(f"an entry point of {SWEEPS} must {rule}")
        found[point.name] = point.value
    return found


def spec_of(named: str) -> SweepSpec:
    """Return the sweep of a file, given by its path, or of a package; raise ValueError if there is none."""
    if named.endswith(".py") or "/" in named:
        path = resolved(Path(named), "FILE")
        module = _module(path, named)
        spec = _only_spec(module, named)
        if spec.own_task is not None and module.__name__ != path.stem:
            rule = "be named as no other module is, with letters, digits and _, since other processes import it"
            raise ValueError(f"the file of a sweep with a task or command of its own must {rule}; got {named}: rename it")
        return replace(spec, name=spec.name or path.stem) if spec.own_task is None else spec.resolved(path.stem)
    known = names()
    if named not in known:
        hint = f": write {named}.py" if Path(f"{named}.py").exists() else did_you_mean(named, known)
        raise ValueError(f"FILE must be the path of a .py file, or one of {', '.join(known)}; got {named}{hint}")
    try:
        module = importlib.import_module(known[named])
    except Exception as error:  # an import may raise anything
        raise ValueError(f"{known[named]} must be a module that can be imported; got {line_of(error)}") from error
    return _only_spec(module, named).resolved(named)


def _module(path: Path, named: str) -> ModuleType:
    """Import the file of a sweep as its folder would: under its own name, and with its folder on the path.

    Processes that this one starts find what lies beside the file, too.
    """
    if not path.is_file():
        raise ValueError(f"FILE must be a file of Python; got {named}: there is no such file")
    if path.suffix != ".py":
        raise ValueError(f"FILE must be the path of a .py file; got {named}")
    add_to_path(path.parent)
    if line := foreign():
        raise ValueError(line)
    name = path.stem
    if program.is_copy(getattr(sys.modules.get(name), "__file__", None)):
        identity.forget(name)  # a sweep of this file was opened before, whose copy of it may be an older one
        task_named.cache_clear()
    known = sys.modules.get(name) or importlib.util.find_spec(name) if name.isidentifier() else None
    file = getattr(known, "__file__", None) or getattr(known, "origin", None)
    if file is None or Path(file).resolve() != path:
        name = f"sweep file {path}"  # a module of that name is another one
    own_code.name(name, path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a file may raise anything
        del sys.modules[name]
        if isinstance(error, ValueError) and " must " in str(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{named} must be a file that can be imported; got {said}{_line_in(error, path)}") from error
    return module


def _line_in(error: BaseException, path: Path) -> str:
    """Return the line of the file at which it failed, in brackets."""
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    lines, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == str(path):
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f" (line {lines[-1]})" if lines else ""


def add_to_path(folder: Path) -> None:
    """Put a folder of the user's on the path of this process, and of those that it starts."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as Python does for a script
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(folder) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, known)])


def _only_spec(module: ModuleType, named: str) -> SweepSpec:
    """Return the module's SWEEP, or else its only SweepSpec."""
    if isinstance(found := getattr(module, "SWEEP", None), SweepSpec):
        return found
    every = {id(value): name for name, value in vars(module).items() if isinstance(value, SweepSpec)}
    if len(every) != 1:
        got = f"{len(every)} ({', '.join(every.values())})" if every else "none"
        raise ValueError(f"{named} must hold one SweepSpec, by the name SWEEP if there are more; got {got}")
    return next(value for value in vars(module).values() if isinstance(value, SweepSpec))
