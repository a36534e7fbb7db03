"""All views of a sweep's run folders at once; each can be deleted and comes again the same."""

from pathlib import Path

from cnnjepa.files import write_atomic
from sweeps import pictures, tables
from sweeps.folder import View


def write_all(view: View) -> list[Path]:
    """Rebuild every view in the sweep folder; returns their paths."""
    folder = view.sweep.path
    write_atomic(folder / "results.csv", tables.results_csv(view))
    write_atomic(folder / "summary.csv", tables.summary_csv(view))
    pictures.draw(view, folder / "ablation.png")
    written = [folder / "results.csv", folder / "summary.csv", folder / "ablation.png"]
    if view.sweep.costs:
        pictures.draw_costs(view, folder / "accuracy_against_cost.png")
        written.append(folder / "accuracy_against_cost.png")
    return written
