"""All views of a sweep's run folders at once; each can be deleted and comes again the same."""

from pathlib import Path

from cnnjepa.run.files import write_atomic
from sweeps.report import plots, tables
from sweeps.state.folder import View


def write_all(view: View) -> list[Path]:
    """Rebuild every view in the sweep folder; returns their paths."""
    folder = view.sweep.path
    write_atomic(folder / "results.csv", tables.results_csv(view))
    write_atomic(folder / "summary.csv", tables.summary_csv(view))
    plots.draw(view, folder / "ablation.png")
    written = [folder / "results.csv", folder / "summary.csv", folder / "ablation.png"]
    if view.sweep.costs:
        plots.draw_costs(view, folder / "accuracy_against_cost.png")
        written.append(folder / "accuracy_against_cost.png")
    return written
