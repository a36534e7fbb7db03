"""What a look at a sweep costs when it has 1,000 and 3,000 runs.

    python tests/benchmarks/many_runs.py [--json] [--runs 1000 3000] [--kind search grid] [--folder DIR]

Every run is made up: a configuration, claims, curves, scores and a result, in the files that a real run writes. Then each command is
started in a new process, of which the seconds and the memory are measured, and the page is opened in Chromium, if it is installed.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _report import publish
from rich.table import Table

from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.identity import from_dict, signature
from sweeps.joint_search import SWEEP
from sweeps.search import sampler
from sweeps.spec.space import applied, baseline
from sweeps.spec.sweep import FIRST_SEED, ScaleName, Search, Trial, build_search
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS_OF_AN_EPOCH = 27, 8
KINDS = ("search", "grid")
# One run in so many is pruned, has failed, or waits.
PRUNED, FAILED, WAITING = 20, 50, 100
CHOOSE = (
    "import sys, pathlib; from sweeps.state.folder import Sweep; from sweeps.state.view import View\n"
    "from sweeps.search.search import choose\n"
    "assert choose(View(Sweep.load(pathlib.Path(sys.argv[1])))) is not None"
)


def plain_search(runs: int, chosen_by: str) -> Search:
    """The joint search, over one configuration more than there are runs."""
    return build_search(
        SWEEP, SWEEP.smoke, "local", [f"epochs={EPOCHS}"], [], sampler=chosen_by, max_trials=runs + 1, seeds=1, max_failures=runs
    )


def fabricated(path: Path, runs: int, kind: str) -> Sweep:
    """A sweep of that kind in `path`, all of whose runs are there."""
    search = plain_search(runs, "tpe")
    first = search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)
    drawing = plain_search(runs, "random")
    if kind == "search":
        sweep = Sweep.of(SWEEP, ScaleName.smoke, [first], path, search)
        sweep.write()
        for number in range(1, runs):
            sweep.register(search.trial(number, number, sampler.suggest([], drawing, number, 0), FIRST_SEED))
        sweep.grow()
    else:
        trials = [first]
        for number in range(1, runs):
            params = {"optimizer.lr": round(0.0005 * 1.004**number, 7), "method.predictor.depth": 1 + number % 3}
            values = applied(search.base, params, FIRST_SEED)
            label = f"lr {params['optimizer.lr']}, depth {params['method.predictor.depth']}"
            trials.append(Trial(number, label, FIRST_SEED, values, signature(from_dict(values))))
        sweep = Sweep.of(SWEEP, ScaleName.smoke, trials, path)
        sweep.write()
    for trial in sweep.trials:
        run_of(sweep, trial)
    return sweep


def run_of(sweep: Sweep, trial: Trial) -> None:
    """Write what a run leaves behind; nothing if it waits."""
    chance, number = random.Random(trial.signature), trial.number
    if number % WAITING == WAITING - 1:
        return
    folder = sweep.run(trial)
    owned = claims.claim(folder.path, 1, Process.me().driver, 0)
    assert owned is not None
    with owned:
        folder.prepare(trial.config)
    failed = RunStatus.failed if number % FAILED == FAILED - 1 else RunStatus.completed
    status = RunStatus.pruned if number % PRUNED == PRUNED - 1 else failed
    height = 70 - 8 * abs(math.log10(float(trial.values["optimizer"]["lr"]) / 0.004))
    epochs = EPOCHS if status is RunStatus.completed else EPOCHS // 3
    lines, probes = [], {}
    for step in range(1, epochs * STEPS_OF_AN_EPOCH + 1):
        epoch, loss = step / STEPS_OF_AN_EPOCH, 1 + math.exp(-step / 60) + chance.gauss(0, 0.02)
        values = {"loss": loss, "lr": 0.001, "grad_norm": chance.random(), "momentum": 0.99, "images_per_second": 800 + chance.gauss(0, 9)}
        lines.append({"kind": "step", "step": step, "epoch": epoch, **values})
        if step % (STEPS_OF_AN_EPOCH * 3) == 0:
            score = height * (1 - math.exp(-epoch / 6)) + chance.gauss(0, 0.5)
            probes[str(int(epoch))] = {sweep.objective: score, "knn.top1": score - 3}
            lines.append({"kind": "probe", "step": step, "epoch": epoch, **probes[str(int(epoch))]})
    (folder.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    score = height + chance.gauss(0, 0.5)
    metrics = {sweep.objective: score, "linear.test_top1": score - 1, "knn.test_top1": score - 4} if status is RunStatus.completed else {}
    cause = {RunStatus.failed: f"loss is not finite at step {len(lines)}", RunStatus.pruned: "stopped at epoch 9", RunStatus.completed: ""}
    measured = {"seconds": 50.0, "device_hours": 0.03 + chance.random() / 100, "images_per_second": 810.0, "parameters": 123_456}
    folder.write_result(RunResult(status, cause[status], metrics, probes=probes, step=epochs * STEPS_OF_AN_EPOCH, **measured))


# A process of its own: what a program is said to have held at most includes the process that started it.
_MEASURE = (
    "import json, resource, subprocess, sys, time\n"
    "began = time.perf_counter()\n"
    "done = subprocess.run(sys.argv[1:], capture_output=True)\n"
    "used, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began\n"
    "sys.stderr.write(done.stderr.decode())\n"
    "print(json.dumps([done.returncode, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, done.stdout.count(10)]))\n"
)


def measured(line: list[str]) -> dict[str, float]:
    """Seconds, the most memory, and the lines of output, of a command in a new process; CPU seconds where others are busy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *line], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    status, seconds, cpu, memory, lines = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(line)} must succeed; got exit status {status}")
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "memory_mb": round(memory), "output_lines": lines}


def commands(path: Path, kind: str) -> dict[str, dict[str, float]]:
    """What each command costs."""
    look = [sys.executable, "-m", "sweeps"]
    lines = {
        "status": [*look, "status", str(path)],
        "status_json": [*look, "status", str(path), "--json"],
        "results": [*look, "results", str(path)],
        "report": [*look, "report", str(path)],
        "study": [*look, "study", str(path)],
    }
    if kind == "search":
        lines["choice"] = [sys.executable, "-c", CHOOSE, str(path)]
    return {name: measured(line) for name, line in lines.items()}


def in_a_browser(page: Path) -> dict[str, float] | None:
    """Seconds until the page in Chromium is drawn and answers, and what a click then takes; None without a browser."""
    import shutil

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return None
    from tests.support.browser import PHONE, opened

    found = {}
    # Two frames after a task are drawn, the page has answered it.
    drawn = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
    for name, size in (("desktop", (1400, 900)), ("phone", PHONE)):
        with opened(page, size) as shown:
            found[f"{name}_interactive_seconds"] = round(shown.driver.execute_async_script(drawn) / 1000, 2)
            before = shown.script("return performance.now()")
            shown.script("document.querySelector('#trials tbody tr').click()")
            found[f"{name}_click_seconds"] = round((shown.driver.execute_async_script(drawn) - before) / 1000, 2)
            found[f"{name}_height_px"] = shown.script("return document.documentElement.scrollHeight")
            found[f"{name}_heap_mb"] = round(shown.script("return performance.memory.usedJSHeapSize") / 2**20)
            assert not [said for said in shown.complaints() if "SEVERE" in said]
    return found


def picture(path: Path) -> dict[str, float]:
    """Width, height and bytes of the picture of the results."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        return {"width_px": image.width, "height_px": image.height, "bytes": path.stat().st_size}


def main() -> int:
    """Make up the sweeps, look at them, and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where the sweeps are kept; default: a temporary folder, removed at the end")
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    table = Table(
        "sweep", "runs", "command", "seconds", "CPU seconds", "memory, MiB", "lines of output", title="What a look at many runs costs"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for kind in asked.kind:
            for runs in asked.runs:
                path = (asked.folder or Path(temporary)) / f"many_{kind}_{runs}-smoke"
                if not path.exists():
                    fabricated(path, runs, kind)
                of_commands = commands(path, kind)
                page = {"bytes": (path / "report.html").stat().st_size, "browser": in_a_browser(path / "report.html")}
                figures[f"{kind}_{runs}"] = {"commands": of_commands, "page": page, "picture": picture(path / "ablation.png")}
                for name, cost in of_commands.items():
                    table.add_row(kind, f"{runs:,}", name, *(f"{value:,}" for value in cost.values()))
    notes = [f"{name}: page {found['page']}, picture {found['picture']}" for name, found in figures.items()]
    publish(asked.json, 1, figures, table, notes)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
