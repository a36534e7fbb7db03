"""What the page of a sweep of 200 trials of 500 points each weighs, and when it answers in a real browser.

    python tests/benchmarks/page.py [--json] [--trials 200] [--points 500] [--repeats 3] [--folder DIR]

Every trial is made up, with a curve of so many steps for each of four metrics, a log and a result. Its page is opened in Chromium, of
which each figure is the median over the repeats.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import publish
from many_runs import fabricated
from plotly.offline import get_plotlyjs
from rich.table import Table

from sweeps.report import html
from sweeps.report.html_curves import points_of_a_curve
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View

# Two frames after a task are drawn, the page has answered it.
_DRAWN = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
_TASKS = {
    "open_a_trial": "document.querySelector('#trials tbody tr').click()",
    "filter": "const box = document.getElementById('filter'); box.value = 'completed'; box.dispatchEvent(new Event('input'))",
    "sort": "document.querySelectorAll('#trials th button')[3].click()",
}


def curves(sweep: Sweep, trial: Trial, points: int) -> None:
    """Write so many steps of a run, and the log that it printed."""
    folder, chance = sweep.run(trial), random.Random(trial.signature)
    if not folder.records.exists():
        return  # it waits
    lines = []
    for step in range(1, points + 1):
        epoch, loss = 27 * step / points, 1 + math.exp(-step / 60) + chance.gauss(0, 0.02)
        values = {"loss": loss, "lr": 0.001, "grad_norm": chance.random(), "images_per_second": 800 + chance.gauss(0, 9)}
        lines.append({"kind": "step", "step": step, "epoch": epoch, **values})
    folder.records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder.logs.mkdir(exist_ok=True)
    said = [f"step {line['step']}/{points} epoch {line['epoch']:.2f} loss {line['loss']:.4f}" for line in lines]
    (folder.logs / "train.log").write_text("\n".join(said))


def weight(page: str) -> dict[str, int]:
    """Bytes of the page, of which Plotly's script is the same for all, and of the parts of its data."""
    data = json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])
    trials = data["trials"]
    parts = {name: len(json.dumps([t[name] for t in trials])) for name in ("curves", "values", "about", "log")}
    whole = len(page.encode())
    return {
        "bytes": whole,
        "bytes_without_plotly": whole - len(get_plotlyjs().encode()),
        **{f"bytes_of_{name}": n for name, n in parts.items()},
    }


def opened_once(page: Path, size: tuple[int, int]) -> dict[str, float]:
    """Seconds until the page is drawn and answers, and then of each task."""
    from tests.support.browser import opened

    with opened(page, size) as shown:
        found = {"interactive": shown.driver.execute_async_script(_DRAWN) / 1000}
        for name, task in _TASKS.items():
            before = shown.script("return performance.now()")
            shown.script(task)
            found[name] = (shown.driver.execute_async_script(_DRAWN) - before) / 1000
        if shown.complaints():
            raise RuntimeError(f"the browser's console must stay empty; got {shown.complaints()}")
        return found


def main() -> int:
    """Make up the sweep, build its page, open it, and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the sweep is kept; default: a temporary folder, removed at the end")
    asked = parser.parse_args()
    from tests.support.browser import PHONE

    with tempfile.TemporaryDirectory() as temporary:
        path = (asked.folder or Path(temporary)) / f"page_{asked.trials}-smoke"
        sweep = Sweep.load(path) if path.exists() else fabricated(path, asked.trials, "search")
        for trial in sweep.trials:
            curves(sweep, trial, asked.points)
        page = html.write(View(sweep))
        figures: dict[str, Any] = {"points_of_a_drawn_curve": points_of_a_curve(asked.trials), **weight(page.read_text())}
        for name, size in (("desktop", (1400, 900)), ("phone", PHONE)):
            repeats = [opened_once(page, size) for _ in range(asked.repeats)]
            figures |= {f"{name}_{task}_seconds": round(statistics.median(r[task] for r in repeats), 2) for task in repeats[0]}
    table = Table("figure", "value", title=f"The page of {asked.trials} trials of {asked.points} points")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    publish(asked.json, asked.repeats, figures, table, [])
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
