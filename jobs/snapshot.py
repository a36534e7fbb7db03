"""Copy the code beside a sweep, named by its content: a worker runs the code of the command that began it.

It is this package, from a checkout or as it is installed, and the user's own files that take part.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnjepa.run.files import to_json
from jobs import own_code

ROOT = own_code.ROOT
_PARTS = (*own_code.OURS, "pyproject.toml")
_RECORD = "code.json"


def _files() -> dict[str, Path]:
    """Return the files to copy, by their paths in the copy."""
    found: list[Path] = []
    for part in map(ROOT.joinpath, _PARTS):
        found += sorted(p for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts) if part.is_dir() else [part]
    return {**{p.relative_to(ROOT).as_posix(): p for p in found if p.exists()}, **own_code.files()}


def digest() -> str:
    """Return 12 hex digits that identify the code."""
    whole = hashlib.sha256()
    for name, path in _files().items():
        data = path.read_bytes()
        whole.update(f"{name} {len(data)}\n".encode() + data)
    return whole.hexdigest()[:12]


def take(folder: Path, commit: Mapping[str, Any]) -> Path:
    """Copy the code and its `commit` to `folder`/<digest>, atomically and once; return the path."""
    target = folder / digest()
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
    for name, path in _files().items():
        copy = beside / name
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


def recorded_commit() -> dict[str, Any]:
    """Return commit and diff of the running snapshot, or {} if this is none."""
    record = ROOT / _RECORD
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return found
