"""Compare a drilled run with the reference run: last checkpoint, records, scores and rows."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import TIMING_KEYS, RunFolder, RunStatus

if TYPE_CHECKING:
    import torch

ASPECTS = ("weights", "moments", "running statistics", "metrics", "probe results", "table rows")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Proof:
    """Result of comparing a run with the reference run."""

    lost: str = ""  # why the run has not completed
    duplicated: list[str] = field(default_factory=list)
    different_bits: int = 0  # of tensors
    different: dict[str, list[str]] = field(default_factory=dict)  # aspect -> what differs
    compared: Counter[str] = field(default_factory=Counter)  # aspect -> number of things compared

    @property
    def holds(self) -> bool:
        """Return whether the run equals the reference run bit for bit."""
        return not (self.lost or self.duplicated or self.different or self.different_bits)

    def compare_values(self, aspect: str, name: Any, ours: Any, theirs: Any) -> None:
        """Note each plain value that differs, by its path."""
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in ours.keys() | theirs.keys():
                self.compare_values(aspect, f"{name}.{key}", ours.get(key), theirs.get(key))
        elif ours != theirs:
            self.differs(aspect, f"{name}: {ours} instead of {theirs}")

    def differs(self, aspect: str, what: str) -> None:
        """Note a difference."""
        self.different.setdefault(aspect, []).append(what)


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, "torch.Tensor"]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}.{key}" if path else str(key))
    elif hasattr(value, "dtype"):
        yield path, value


def _aspect(path: str) -> str:
    if path.startswith("optimizer"):
        return "moments"
    return "running statistics" if path.endswith(_STATISTICS) else "weights"


def _last_state(run: Path) -> dict[str, Any]:
    import torch

    newest = checkpoint.newest_good(run / "checkpoints")
    return {} if newest is None else checkpoint.read(newest, torch.device("cpu"))


def compare_states(proof: Proof, state: dict[str, Any], reference: dict[str, Any]) -> None:
    """Compare two checkpoints byte by byte."""
    import torch

    ours, theirs = dict(_tensors(state)), dict(_tensors(reference))
    for path in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(path), theirs.get(path)
        proof.compared[_aspect(path)] += 1
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            proof.differs(_aspect(path), f"{path} is not in both, or of another shape")
            continue
        bytes_a, bytes_b = (t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b))
        bits = int.from_bytes((bytes_a ^ bytes_b).tobytes(), "little").bit_count()
        if bits:
            proof.different_bits += bits
            proof.differs(_aspect(path), f"{path}: {bits} bits")
    if state.get("step") != reference.get("step"):
        proof.differs("weights", f"step {state.get('step')} instead of {reference.get('step')}")


def _without_timing(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in TIMING_KEYS}


def compare_records(proof: Proof, records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Compare two metrics.jsonl files and find duplicated records."""
    often = Counter((r["kind"], r["step"]) for r in records)
    proof.duplicated += [f"{kind} record of step {step}" for (kind, step), n in often.items() if n > 1]
    ours, theirs = ([json.dumps(_without_timing(r), sort_keys=True) for r in found] for found in (records, reference))
    proof.compared["metrics"] += len(theirs)
    if ours != theirs:
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        proof.differs("metrics", f"{len(ours)} records instead of {len(theirs)}, from the {first + 1}th on")


def compare_rows(proof: Proof, table: Path, reference: Path) -> None:
    """Compare two results.csv files and find duplicated rows."""
    ours, theirs = ([_without_timing(dict(row)) for row in csv.DictReader(path.open())] for path in (table, reference))
    often = Counter(row["signature"] for row in ours)
    proof.duplicated += [f"row of {signature}" for signature, n in often.items() if n > 1]
    proof.compared["table rows"] += len(theirs)
    nothing: dict[str, str] = {}
    for a, b in itertools.zip_longest(ours, theirs, fillvalue=nothing):
        proof.compare_values("table rows", b.get("setting", a.get("setting")), a, b)  # a column of the CSV file


def prove(run: Path, reference: Path) -> Proof:
    """Compare two runs of sweeps whose tables have been written."""
    proof = Proof()
    result, expected = RunFolder(run).result(), RunFolder(reference).result()
    assert expected is not None
    if result is None or result.status is not RunStatus.completed:
        proof.lost = "it has no result" if result is None else f"{result.status.name}: {result.cause}"
        return proof
    compare_states(proof, _last_state(run), _last_state(reference))
    compare_records(proof, RunFolder(run).metrics(), RunFolder(reference).metrics())
    ours, theirs = _without_timing(result.to_dict()), _without_timing(expected.to_dict())
    proof.compared["probe results"] += len(expected.metrics) + sum(map(len, expected.probes.values()))
    for key in ours:
        proof.compare_values("probe results", key, ours[key], theirs[key])
    compare_rows(proof, run.parent.parent / "results.csv", reference.parent.parent / "results.csv")
    return proof
