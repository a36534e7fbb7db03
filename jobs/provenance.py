"""Record where a run came from: enough to run it again."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cnnjepa.run.console import DISTRIBUTION
from cnnjepa.run.files import sealed_json, write_atomic
from jobs import own_code
from jobs.own_code import ROOT
from jobs.snapshot import recorded_commit

_PACKAGES = (DISTRIBUTION, "torch", "torchvision", "numpy", "pillow", "ray", "optuna", "hydra-core", "submitit", "scikit-learn")
_LONGEST_DIFF = 1_000_000
_SECRET = re.compile(r"((?:token|secret|passw|passphrase|api_?key|credential)[\w.-]*\s*[=:]).+", re.I | re.S)
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)")


def commit_and_diff() -> dict[str, Any]:
    """Return where the code that runs came from: `commit` and `diff`, each "" if unknown, and `own`.

    `commit` is that of the checkout, "" for an installed package. `diff` holds what no commit does:
    uncommitted changes, and the whole of each imported file that git does not know. `own` lists
    the user's own files that take part, each with the commit of its repository or "".
    """
    return recorded_commit() or _looked_up()


def _looked_up() -> dict[str, Any]:
    own = own_code.files()
    ours = _imported()
    known = _tracked(ROOT, ours.values())
    is_checkout = Path(__file__).resolve() in known  # and no installation below a repository of the user's
    diffs = [_git("diff", "HEAD", folder=ROOT)] if is_checkout else []
    commits, top = {}, _top(ROOT) if is_checkout else None
    for folder in sorted({path.parent for path in own.values()}):
        repository, here = _top(folder), [path for path in own.values() if path.parent == folder]
        tracked = _tracked(folder, here) if repository else set()
        known |= tracked
        if tracked and repository != top:
            diffs.append(_git("diff", "HEAD", "--", *map(str, sorted(tracked)), folder=folder))
        commits[folder] = _git("rev-parse", "HEAD", folder=folder).strip() if tracked else ""
    among = {**ours, **own} if is_checkout else own
    diffs += [_whole(name, path) for name, path in among.items() if path not in known]
    commit = _git("rev-parse", "HEAD", folder=ROOT).strip() if is_checkout else ""
    return {
        "commit": commit,
        "diff": _bounded("".join(diffs)),
        "own": {name: commits[path.parent] if path in known else "" for name, path in own.items()},
    }


def _imported() -> dict[str, Path]:
    """Return the files of this package that this process runs, by their paths below its root."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in files if file}
    return {p.relative_to(ROOT).as_posix(): p for p in sorted(paths) if any(p.is_relative_to(ROOT / part) for part in own_code.OURS)}


def _top(folder: Path) -> Path | None:
    """Return the repository that a folder is in, or None."""
    found = _git("rev-parse", "--show-toplevel", folder=folder).strip()
    return Path(found).resolve() if found else None


def _tracked(folder: Path, paths: Iterable[Path]) -> set[Path]:
    """Return those of `paths` that git knows in the repository of `folder`."""
    names = _git("ls-files", "-z", "--", *map(str, paths), folder=folder)
    return {(folder / name).resolve() for name in names.split("\0") if name}


def _whole(name: str, path: Path) -> str:
    """Return a file that is in no commit, as a diff that adds it."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"diff --git a/{name} b/{name}\n({error.strerror})\n"
    lines = text.splitlines()
    head = [f"diff --git a/{name} b/{name}", "new file mode 100644", "--- /dev/null", f"+++ b/{name}", f"@@ -0,0 +1,{len(lines)} @@"]
    end = [] if text.endswith("\n") else ["\\ No newline at end of file"]
    return "\n".join([*head, *(f"+{line}" for line in lines), *end, ""]) if lines else "\n".join([*head[:2], ""])


def _bounded(diff: str) -> str:
    """Return the diff, or as much of it as is kept and a line that says so."""
    if len(diff) <= _LONGEST_DIFF:
        return diff
    return f"{diff[:_LONGEST_DIFF]}\n(the first {_LONGEST_DIFF:,} of {len(diff):,} characters)\n"


def _git(*arguments: str, folder: Path) -> str:
    """Return what git prints in `folder`, or "" if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def scrubbed(word: str) -> str:
    """Mask what looks like a secret in `word`: the value of a key like token, a URL's password."""
    return _PASSWORD.sub(r"\1***\2", _SECRET.sub(r"\1***", word))


def _version(package: str) -> str:
    """Return the installed version, or "": a node that only trains needs no Ray or Optuna."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


_about: dict[str, Any] = {}  # what a process that works for a command was given


def typed() -> list[str]:
    """Return the words of this process's command as a person typed them, without what looks like a secret."""
    first, module = sys.argv[0], getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")
    if Path(first).name.startswith("cnnjepa-"):
        words = [Path(first).name]
    elif module and Path(first).suffix == ".py":  # python -m
        words = ["python", "-m", module.removesuffix(".__main__")]
    else:
        words = ["python", first]
    return [scrubbed(word) for word in [*words, *sys.argv[1:]]]


@contextmanager
def of_trial(overrides: Sequence[str], command: Sequence[str] | None) -> Iterator[None]:
    """Record, inside the block, a trial's overrides, and the command of the person for whom this process works.

    None stands for the command of this process.
    """
    given = {"command": list(command)} if command else {}
    _about.update(given, overrides=[scrubbed(word) for word in overrides])
    try:
        yield
    finally:
        _about.clear()


def provenance() -> dict[str, Any]:
    """Return commit, diff, package versions, host, time, the person's command and this process's."""
    return {
        **commit_and_diff(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": typed(),
        "process": sys.argv[0],  # of a worker, which Ray or Slurm started
        "code": str(ROOT),
        **_about,
    }


def record(run_dir: Path) -> None:
    """Write provenance.json when the run first starts; a resume keeps it."""
    path = run_dir / "provenance.json"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sealed_json(provenance()))
