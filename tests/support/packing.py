"""Packs image sets as the command does, and damages them."""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cnnjepa.data import pack


def packing(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cnnjepa.data.pack", *map(str, arguments), "--workers", "2"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, main: Callable[[], int] = pack.main) -> Done:
    """The command in this process, with one worker."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["command", *map(str, arguments), "--workers", "1"])
        return Done(main(), out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def damage(folder: Path, how: str) -> str:
    """What a user must read."""
    file = folder / "train-00001.arrow"
    if how == "truncated":
        os.truncate(file, 5000)
        return f"data.root must hold train-00001.arrow with all of its {read_size(folder)} bytes; got 5000 bytes in {folder}"
    if how == "missing":
        file.unlink()
        return f"data.root must hold every file of its manifest; got {folder} without train-00001.arrow"
    if how == "another file":
        file.write_bytes(bytes(read_size(folder)))
        return f"data.root must hold a packed set that can be read; got {file} must be an Arrow file with the columns image and label"
    (folder / "manifest.json").write_text('{"files": 3}' if how == "manifest" else "{")
    return f"data.root must hold a manifest.json that this version can read, cnnjepa-packed-1; got {folder / 'manifest.json'}"


def read_size(folder: Path) -> int:
    return next(f["bytes"] for f in json.loads((folder / "manifest.json").read_text())["files"] if f["name"] == "train-00001.arrow")
