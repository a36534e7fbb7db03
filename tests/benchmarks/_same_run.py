"""Holds two run folders against each other: are tensors and records the same bits, and if not, how far apart, where, from which step on?"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import TIMING_KEYS, RunFolder

# Of losses, where the device does not repeat itself: bf16 rounds to 1 part in 256, and a run of some hundred steps amplifies it.
LOSS_TOLERANCE = 0.05


def tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint's state by their path, such as method.encoder.conv1.weight; plain numbers of the optimiser too."""
    if isinstance(state, Tensor):
        return {path: state}
    pairs = list(state.items()) if isinstance(state, dict) else list(enumerate(state)) if isinstance(state, list) else []
    return {name: t for key, inner in pairs for name, t in tensors(inner, f"{path}.{key}" if path else str(key)).items()}


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value of `b`: 0 for equal bits alone, infinite where they cannot be compared."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf
    if torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)):
        return 0.0
    found = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
    # Bits that differ without a difference, such as 0 and -0, count as the smallest number.
    return max(found, math.ulp(0.0)) if math.isfinite(found) else math.inf


def compare_states(state: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """The largest relative difference of any tensor and that tensor's name; (0, "") for the same bits."""
    ours, theirs = tensors(state), tensors(other)
    worst = (0.0, "")
    for name in sorted(ours.keys() | theirs.keys()):
        found = relative(ours[name], theirs[name]) if name in ours and name in theirs else math.inf
        worst = max(worst, (found, name), key=lambda pair: pair[0])
    return worst


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in TIMING_KEYS}


def compare_records(records: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Where two metrics.jsonl part, timing left out: first step and what differs there, and the largest relative difference of a loss."""
    often = Counter((r["kind"], r["step"]) for r in records)
    twice = [f"{kind} record of step {step}" for (kind, step), n in often.items() if n > 1]
    ours, theirs = ({(r["kind"], r["step"]): _untimed(r) for r in found} for found in (records, other))
    first: tuple[int | None, str] = (None, "")
    loss = 0.0
    for key in sorted(ours.keys() | theirs.keys(), key=lambda k: (k[1], k[0])):
        a, b = ours.get(key), theirs.get(key)
        if a != b and first[0] is None:
            first = key[1], f"the {key[0]} record is not in both"
            if a is not None and b is not None:
                name = next(k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))
                first = key[1], f"{name} {a.get(name)} instead of {b.get(name)}"
        if key[0] == "step":
            one, two = (a or {}).get("loss"), (b or {}).get("loss")
            loss = max(loss, math.inf if one is None or two is None else abs(one - two) / abs(two) if one != two else 0.0)
    return {"first_different_step": first[0], "first_difference": first[1], "loss_apart": loss, "twice": twice}


def hold_against(run: Path, other: Path) -> dict[str, Any]:
    """`run` against `other`, both at their end: see the keys; a difference that has no number (not finite, not in both) is infinite."""
    states = []
    for folder in (run, other):
        newest = checkpoint.newest_good(folder / "checkpoints")
        if newest is None:
            raise ValueError(f"a run at its end must have a checkpoint; got none in {folder}")
        states.append(checkpoint.read(newest, torch.device("cpu")))
    apart, where = compare_states(states[0]["method"], states[1]["method"])
    moments, moments_where = compare_states(states[0]["optimizer"], states[1]["optimizer"])
    if moments > apart:
        apart, where = moments, f"optimizer.{moments_where}"
    if states[0]["step"] != states[1]["step"]:
        apart, where = math.inf, f"step {states[0]['step']} instead of {states[1]['step']}"
    records = compare_records(RunFolder(run).metrics(), RunFolder(other).metrics())
    same = apart == 0 and records["first_different_step"] is None and not records["twice"]
    return {"same_bits": same, "largest_relative": apart, "where": where, **records}


def verdict(found: dict[str, Any], resumed_at: int) -> tuple[list[str], str]:
    """What is wrong with a run that was killed and resumed at step `resumed_at`, and one line that says how it compares.

    Until it was killed it was a run like the other: where they differ by then, the device does not repeat itself, and only losses that
    are far apart count as a fault of the resume.
    """
    if found["same_bits"]:
        return [], "same bits"
    first = found["first_different_step"]
    since = "" if first is None else f", from step {first} on ({found['first_difference']})"
    said = f"different: {found['largest_relative']:.1e} of the largest value in {found['where'] or 'no tensor'}{since}"
    if found["twice"]:
        return [f"recorded twice: {found['twice'][0]}"], said
    if first is None or first > resumed_at:
        return [f"the resumed run is {said}; it was resumed at step {resumed_at}"], said
    said = f"the device does not repeat a run: {said}; resumed at step {resumed_at}"
    far = found["loss_apart"] > LOSS_TOLERANCE or not math.isfinite(found["largest_relative"])
    return [f"losses are {found['loss_apart']:.1e} apart, more than {LOSS_TOLERANCE}: {said}"] if far else [], said
