"""Reads what W&B has written offline: the records of a .wandb file, a log of LevelDB's form."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7
_FULL, _LAST = 1, 4


@dataclass
class Offline:
    """One run of a .wandb file."""

    id: str = ""
    name: str = ""
    group: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of its history
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)  # name -> its files
    exit_code: int | None = None


def offline_runs(folder: Path) -> dict[str, Offline]:
    """The runs in folders offline-run-* by name; no two may have the same ID."""
    found = [read(next(path.glob("*.wandb"))) for path in sorted(folder.glob("offline-run-*"))]
    assert len({run.id for run in found}) == len(found)
    return {run.name: run for run in found}


def read(path: Path) -> Offline:
    run = Offline()
    for data in _payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            made = record.run
            run.id, run.name, run.group, run.project, run.tags = (
                made.run_id,
                made.display_name,
                made.run_group,
                made.project,
                list(made.tags),
            )
            run.config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in made.config.update}
        elif kind == "history":
            run.rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            run.summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
        elif kind == "request" and record.request.HasField("log_artifact"):
            made = record.request.log_artifact.artifact
            run.artifacts[made.name] = [entry.path for entry in made.manifest.contents]
        elif kind == "artifact":
            run.artifacts[record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
    return run


def _payloads(data: bytes) -> Iterator[bytes]:
    """The records of a log: fragments in blocks, after W&B's own header of 7 bytes."""
    at, whole = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        whole += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
