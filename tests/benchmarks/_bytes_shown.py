"""The table of `step.py --bytes`, and what it adds up to."""

from typing import Any

from rich.table import Table

from cnnjepa.monitoring.traffic import LAYERS


def table_of(row: dict[str, Any]) -> Table:
    """MB per image of one batch size, by part and layer."""
    table = Table("of", *LAYERS, "beside", "MB", "launches", title=f"computed, not measured: batch {row['batch']}, MB per image")
    for r in row["rows"]:
        parts = [r.get(kind, 0.0) for kind in (*LAYERS, "beside")]
        where = " ".join([r["part"], r["layer"]]).strip() + (", backward" if r["backward"] else "")
        table.add_row(where, *(f"{p:.1f}" for p in parts), f"{sum(parts):.1f}", f"{r['launches']:.0f}")
    return table


def notes_of(figures: dict[str, Any]) -> list[str]:
    """What the table adds up to."""
    said = []
    for r in figures["rows"]:
        layers = f"layers {r['layers_mb']:.0f} MB per image, with BatchNorm + ReLU (+ sum) as one kernel {r['layers_fused_mb']:.0f}"
        whole = f"the whole step {r['step_mb']:.0f} and {r['step_fused_mb']:.0f}; {r['launches']} launches a step"
        said.append(f"batch {r['batch']}, {r['visible']:.3f} visible: {layers}; {whole}")
    trace = figures["trace"]
    lacking = f"LACKING {'; '.join(trace['lacking'][:5])}" if trace["lacking"] else "none is lacking there"
    said.append(
        f"{trace['ops']} ops held against a recorded trace of torch.profiler at batch {trace['batch']}, {trace['size']} px: {lacking}"
    )
    return said
