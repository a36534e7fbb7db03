"""Read the records of a run, metrics.jsonl: one JSON object per line, of which the last may be torn."""

import json
from pathlib import Path
from typing import Any


def probes_of(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return epoch -> metrics with a value, from the probes among records of metrics.jsonl."""
    return {
        f"{r['epoch']:g}": {k: v for k, v in r.items() if k not in ("kind", "step", "epoch") and v is not None}
        for r in records
        if r["kind"] == "probe"
    }


def record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record of a complete line, or None for a line that was torn or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_record(record) else None


def _is_record(record: dict[str, Any]) -> bool:
    """Return whether a record has its keys, and numbers where it is read as numbers."""
    kind, step, epoch = (record.get(key) for key in ("kind", "step", "epoch"))
    if not isinstance(kind, str) or type(step) is not int or type(epoch) not in (int, float):
        return False
    read_as_numbers = record.values() if kind in ("step", "probe") else (step, epoch)
    return all(value is kind or value is None or _is_number(value) for value in read_as_numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300


def read_probes(path: Path, start: int = 0) -> tuple[dict[str, dict[str, float]], int]:
    """Return `probes_of` a file from byte `start`, and where to continue; parse only probes."""
    if not path.exists():
        return {}, 0
    with open(path, "rb") as file:
        file.seek(start)
        *lines, rest = file.read().split(b"\n")
        found = [record for line in lines if line.startswith(b'{"kind": "probe"') and (record := record_of(line))]
        return probes_of(found), file.tell() - len(rest)


def read_metrics(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the records in a metrics file or its last bytes, without a torn last line."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        skipped = max(path.stat().st_size - last_bytes, 0) if last_bytes is not None else 0
        file.seek(skipped)
        lines = file.read().split(b"\n")[:-1]
    return [record for line in lines[bool(skipped) :] if (record := record_of(line))]


def missing_steps(records: list[dict[str, Any]], step: int, every: int) -> list[int]:
    """Return the steps up to `step` without a record, where one was due at each `every`-th."""
    recorded = {r["step"] for r in records if r["kind"] == "step"}
    return [due for due in range(every, step + 1, every) if due not in recorded]
