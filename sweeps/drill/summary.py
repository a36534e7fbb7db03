"""Summarise a drill: faults by kind, their cost, and whether anything was lost or changed."""

import statistics
from collections import Counter

from sweeps.drill.campaign import Drill
from sweeps.drill.compare import ASPECTS


def figures(drill: Drill) -> dict[str, float]:
    """Return the figures that rate a drill."""
    lost = [s.seconds_lost for s in drill.injected]
    return {
        "faults": len(drill.injected),
        "runs": len(drill.proofs),
        "lost": drill.lost,
        "duplicated": drill.duplicated,
        "different_bits": drill.different_bits,
        "steps_repeated": sum(s.steps_repeated for s in drill.injected),
        "seconds_lost_mean": statistics.fmean(lost) if lost else 0.0,
    }


def by_kind(drill: Drill) -> list[tuple[str, int, int, float, float]]:
    """Return (fault, times, steps repeated, mean and maximum of seconds lost), costliest first."""
    rows = []
    for name in {s.fault for s in drill.injected}:
        found = [s for s in drill.injected if s.fault == name]
        seconds = [s.seconds_lost for s in found]
        rows.append((name, len(found), sum(s.steps_repeated for s in found), statistics.fmean(seconds), max(seconds)))
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def equalities(drill: Drill) -> list[str]:
    """Return one line for each aspect that was compared."""
    compared = sum((p.compared for p in drill.proofs), Counter[str]())
    lines = []
    for aspect in ASPECTS:
        wrong = [what for p in drill.proofs for what in p.different.get(aspect, [])]
        said = "equal bit for bit" if not wrong else f"DIFFERENT: {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        lines.append(f"  {aspect:20} {compared[aspect]:7,} compared: {said if compared[aspect] else 'NOT COMPARED'}")
    return lines


def report(drill: Drill, asked: int) -> str:
    """Return the whole report as plain text."""
    total = figures(drill)
    lines = ["", f"{'fault':32} {'times':>5} {'steps repeated':>15} {'seconds lost: mean':>19} {'most':>6}"]
    lines += [f"{n:32} {times:5} {steps:15} {mean:19.1f} {most:6.1f}" for n, times, steps, mean, most in by_kind(drill)]
    lines += [f"{'all':32} {total['faults']:5} {total['steps_repeated']:15} {total['seconds_lost_mean']:19.1f}", ""]
    lines += [
        f"{total['faults']} of {asked} faults injected into {total['runs']} runs, compared with an undisturbed reference run:",
        *equalities(drill),
    ]
    lines += [f"  runs lost: {total['lost']}; duplicated records or rows: {total['duplicated']}; differing bits: {total['different_bits']}"]
    lines += [f"  {cause}" for p in drill.proofs if (cause := p.lost)]
    lines += [f"left out: {what}: {why}" for what, why in drill.left_out.items()]
    return "\n".join([*lines, "NOTHING IS LOST" if drill.holds and total["faults"] == asked else "THE DRILL HAS FAILED"])
