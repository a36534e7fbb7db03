"""Checkpoints that are whole, verified and few.

A file is `step-<step>-<sha256 of its bytes, 16 digits>.pt`: the name is the checksum, so that one atomic rename publishes both, and a
plain `torch.load(path, weights_only=True)` still reads it. Finding files needs no torch: who only watches runs does not pay for it.
"""

import hashlib
import io
import itertools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjepa.files import write_atomic

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A published file and what its name promises."""

    path: Path
    step: int  # optimiser steps done
    digest: str


def find(folder: Path) -> list[Checkpoint]:
    """The published checkpoints of `folder`, newest first, none of them opened; [] where there is no folder."""
    found = []
    for path in folder.glob("step-*.pt") if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.append(Checkpoint(path, int(match[1]), match[2]))
    return sorted(found, key=lambda c: c.step, reverse=True)


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Checkpoint:
    """Publish `state`, whole or not at all, then remove all but the `keep` newest files."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    folder.mkdir(parents=True, exist_ok=True)
    saved = Checkpoint(folder / f"step-{step:09d}-{_digest(data)}.pt", step, _digest(data))
    write_atomic(saved.path, bytes(data))
    for old in find(folder)[keep:]:
        old.path.unlink(missing_ok=True)
    return saved


def read(checkpoint: Checkpoint, device: "torch.device") -> dict[str, Any]:
    """The saved state; raises ValueError where the bytes are not those that were published."""
    import torch

    data = checkpoint.path.read_bytes()
    if _digest(data) != checkpoint.digest:
        raise ValueError(f"{checkpoint.path.name}: {len(data)} bytes do not have the checksum of the name")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return state


def newest_good(folder: Path, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose bytes are intact; a damaged one is reported, with `set_aside` renamed to `*.damaged`, and passed over."""
    found = find(folder)
    for checkpoint, before in itertools.zip_longest(found, found[1:]):
        if _digest(checkpoint.path.read_bytes()) == checkpoint.digest:
            return checkpoint
        instead = "there is none before it: starting from the beginning" if before is None else "using the one before it"
        log.warning("checkpoint %s is damaged (checksum differs): %s", checkpoint.path, instead)
        if set_aside:
            checkpoint.path.rename(checkpoint.path.with_suffix(".damaged"))
    return None
