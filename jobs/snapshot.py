"""The code of a submission: a copy beside the sweep, named by its content, so that a job that starts next week runs what was submitted."""

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
    """12 hex digits, the same for the same code."""
    whole = hashlib.sha256()
    for path in _files():
        data = path.read_bytes()
        whole.update(f"{path.relative_to(ROOT)} {len(data)}\n".encode() + data)
    return whole.hexdigest()[:12]


def take(folder: Path, commit: dict[str, str]) -> Path:
    """A copy of this code in `folder`/<digest>, whole or not at all, with the commit and diff that it is; made once."""
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
    """The commit and diff of the snapshot that runs now, nothing where this is no snapshot."""
    record = ROOT / _RECORD
    found: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
    return found
