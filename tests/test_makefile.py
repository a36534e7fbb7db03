"""`make install`: which build of PyTorch it looks for."""

import subprocess

from tests.support.documented import ROOT, typed


def printed(*words: str) -> str:
    """What make would run; nothing is run."""
    done = subprocess.run([words[0], "--dry-run", "--always-make", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "pip install" in line)


def test_with_cpu_the_cpu_build_is_looked_for_too() -> None:
    """Of equal versions pip takes the one with a local part, 2.14.1+cpu; the pins admit it."""
    assert "--extra-index-url https://download.pytorch.org/whl/cpu " in printed(*typed("make install CPU=1", {}))
    assert "index-url" not in printed("make", "install")
    assert "--constraint constraints.txt" in printed("make", "install")
