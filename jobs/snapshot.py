"""Copy the code beside a sweep, named by its content: a job runs the code that was submitted."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from cnnjepa.run.files import to_json

ROOT = Path(__file__).resolve().parent.parent
_PARTS = ("cnnjepa", "jobs", "sweeps", "slurm", "pyproject.toml")
_RECORD = "code.json"


def _files() -> list[Path]:
    found = []
    for part in map(ROOT.joinpath, _PARTS):
        found += sorted(p for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if part.is_dir() else [part]
    return [p for p in found if p.exists()]


def digest() -> str:
    """Return 12 hex digits that identify the code."""
    whole = hashlib.sha256()
    for path in _files():
        data = path.read_bytes()
        whole.update(f"{path.relative_to(ROOT)} {len(data)}\n".encode() + data)
    return whole.hexdigest()[:12]


def take(folder: Path, commit: dict[str, str]) -> Path:
    """Copy the code and its `commit` to `folder`/<digest>, atomically and once; return the path."""
    target = folder / digest()
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
    for path in _files():
        copy = beside / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (beside / _RECORD).write_text(to_json(commit))
    beside.chmod(0o755)
    try:
        os.rename(beside, target)
    except OSError:
        shutil.rmtree(beside)  # another command was first; the content is the same
        if not target.exists():
            raise
    return target


def recorded_commit() -> dict[str, str]:
    """Return commit and diff of the running snapshot, or {} if this is none."""
    record = ROOT / _RECORD
    found: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    return found
