"""Copy the code beside a sweep, named by its content: a worker runs the code of the command that began it.

It is this package, from a checkout or as it is installed, and the user's own files that take part.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnjepa.run.files import to_json
from jobs import own_code
from jobs.program import copy_whole

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
    copy_whole(target, _files(), **{_RECORD: to_json(commit)})
    return target


def recorded_commit() -> dict[str, Any]:
    """Return commit and diff of the running snapshot, or {} if this is none."""
    record = ROOT / _RECORD
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return found
