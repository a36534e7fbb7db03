"""Record where a run came from: enough to run it again."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cnnjepa.run.files import sealed_json, write_atomic
from jobs.snapshot import recorded_commit

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "ray", "optuna", "hydra-core", "submitit", "scikit-learn")
_LONGEST_DIFF = 1_000_000
_SECRET = re.compile(r"((?:token|secret|passw|passphrase|api_?key|credential)[\w.-]*\s*[=:]).+", re.I | re.S)
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)")


def commit_and_diff() -> dict[str, str]:
    """Return the commit of the running code and its uncommitted diff, each "" if unknown."""
    return recorded_commit() or {"commit": _git("rev-parse", "HEAD").strip(), "diff": _git("diff", "HEAD")[:_LONGEST_DIFF]}


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
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


def provenance() -> dict[str, Any]:
    """Return commit, diff, package versions, host, time and command."""
    return {
        **commit_and_diff(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [scrubbed(word) for word in sys.argv],
    }


def record(run_dir: Path) -> None:
    """Write provenance.json when the run first starts; a resume keeps it."""
    path = run_dir / "provenance.json"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sealed_json(provenance()))
