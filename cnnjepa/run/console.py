"""Start the commands that the wheel installs, once no other package hides a part of this one."""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

DISTRIBUTION = "cnnjepa-sweeps"
# Groups of entry points: what each command runs; and methods, sweeps and profiles that other packages offer.
COMMANDS, METHODS, SWEEPS, PROFILES = "cnnjepa_commands", "cnnjepa_methods", "cnnjepa_sweeps", "cnnjepa_profiles"
_ROOT = Path(__file__).resolve().parents[2]
_SHARED = ("jobs", "sweeps")  # names that other packages have too


def distribution() -> importlib.metadata.Distribution | None:
    """Return the metadata of the installed package that this code belongs to, or None in a checkout."""
    for found in importlib.metadata.distributions(name=DISTRIBUTION):
        if Path(str(found.locate_file(""))).resolve() == _ROOT:
            return found
    return None


def offered(group: str) -> tuple[importlib.metadata.EntryPoint, ...]:
    """Return the entry points of a group, of all packages on the path; those of a path are looked for once."""
    return _offered(group, tuple(sys.path))


@functools.lru_cache(32)
def _offered(group: str, _path: tuple[str, ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=group))


def foreign() -> str:
    """Return one line about a module that hides or has overwritten a part of this package, or ""."""
    for name in _SHARED:
        # Where another process would find it: what this one has imported says nothing about that.
        found = PathFinder.find_spec(name) or importlib.util.find_spec(name)
        file = Path(found.origin).resolve() if found is not None and found.origin else None
        if file != _ROOT / name / "__init__.py":
            where = file or "nothing"
            return (
                f"the module {name} must be the one of {DISTRIBUTION}; got {where}: rename or uninstall that one, or take it off the path"
            )
    return _overwritten()


def _overwritten() -> str:
    """Return one line about a file that another package has installed over ours, or ""."""
    ours = distribution()
    recorded = [f for f in (ours.files if ours else None) or [] if f.parts[0] in _SHARED and f.size is not None]
    changed = next((f for f in recorded if not (path := _ROOT / f).exists() or path.stat().st_size != f.size), None)
    if changed is None:
        return ""
    # Only now, since this reads the metadata of every package. A file that a person has edited belongs to no other package.
    for other in importlib.metadata.distributions():
        if other.metadata["Name"] != DISTRIBUTION and changed in (other.files or []):
            whose = f"the file of the package {other.metadata['Name']}"
            again = f"uninstall it, and install {DISTRIBUTION} again"
            return f"{_ROOT / changed} must be the file of {DISTRIBUTION}; got {whose}: {again}"
    return ""


def require_own() -> None:
    """Refuse to go on where another package hides ours: exit with 2, or in a notebook raise ImportError."""
    if not (line := foreign()):
        return
    if hasattr(sys.modules.get("__main__"), "__file__"):
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(line)


def main() -> int:
    """Run the command by whose name this process was started; return its exit status."""
    if line := foreign():
        print(f"error: {line}", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` has it too: the user's own modules are found from their folder
    name, ours = Path(sys.argv[0]).stem, distribution()
    known = (ours or importlib.metadata.distribution(DISTRIBUTION)).entry_points
    (found,) = known.select(group=COMMANDS, name=name)
    return int(found.load()())
