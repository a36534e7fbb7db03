"""The wheel, built from a copy of the checkout and installed into a folder that holds nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cnnjepa.run import console
from tests.support.documented import ROOT

_PARTS = ("cnnjepa", "jobs", "sweeps", "slurm", "pyproject.toml", "README.md", "LICENSE")


def built(folder: Path) -> Path:
    """Build the wheel below `folder` and return it. Nothing is written into the checkout."""
    source = folder / "source"
    for part in map(ROOT.joinpath, _PARTS):
        if part.is_dir():
            shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(part, source / part.name if source.exists() else folder)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (made,) = folder.glob("*.whl")
    return made


def pip(python: str, *words: str, timeout: float = 300) -> None:
    """Run pip without a question to an index."""
    line = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr


def installed(wheel: Path, target: Path, python: str = sys.executable) -> Path:
    """Install the wheel alone into the folder `target`, and return it."""
    pip(python, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def environment(*path: Path) -> dict[str, str]:
    """Return an environment in which modules are found in these folders first, and the checkout is not on PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(words: list[str], cwd: Path, env: dict[str, str], timeout: float = 300) -> tuple[int, str]:
    """Return exit status and output of a command."""
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout + done.stderr


def offer(folder: Path, name: str, **points: dict[str, str]) -> None:
    """Write the metadata of an installed package that offers entry points, by group, into a folder of sys.path."""
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [line for group, found in points.items() for line in [f"[{group}]", *(f"{k} = {v}" for k, v in found.items())]]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    console._offered.cache_clear()
