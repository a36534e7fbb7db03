"""Train a grid of configurations to the end, over several seeds, and keep their probe curves: what tests/benchmarks/search.py replays.

python tests/benchmarks/record_curves.py digits         192 runs of CNN-JEPA on digits; writes curves.json
python tests/benchmarks/record_curves.py fashion        216 runs of SimCLR on Fashion-MNIST; writes curves_fashion.json

One file a run is kept beside them while it works, so that it can be stopped and started again.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from _curve_sets import METRIC, SETS, Configuration, CurveSet, run_name

from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.train import train
from jobs.config import compose_job


def run(name: str, values: Configuration, seed: int, parts: Path) -> None:
    """Train one configuration and keep its curve: epoch -> percent on the held-out part. It is empty from where the run failed."""
    made = SETS[name]
    file = parts / run_name(values, seed).replace(" ", "_")
    if file.exists():
        return
    config = compose_job([*made.overrides, *(f"{k}={v}" for k, v in zip(made.grid, values, strict=True)), f"seed={seed}"]).train
    config.probes.at_epochs = list(made.probed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        folder.prepare(config)
        result = train(config, folder)
    assert result is not None
    curve = {epoch: round(metrics[METRIC], 2) for epoch, metrics in result.probes.items()}
    if result.status is RunStatus.completed:
        curve[str(made.epochs)] = round(result.metrics[METRIC], 2)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(curve))
    part.rename(file)


def record(made: CurveSet, jobs: int) -> None:
    """Train what is missing, on `jobs` processes, then write the one file."""
    parts = made.file.with_suffix(".parts")
    parts.mkdir(exist_ok=True)
    wanted = [(values, seed) for seed in made.seeds for values in product(*made.grid.values())]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(run, made.name, values, seed, parts) for values, seed in wanted]:
            future.result()
    curves = {run_name(v, s): json.loads((parts / run_name(v, s).replace(" ", "_")).read_text()) for v, s in wanted}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
    about = {"base": made.overrides, "grid": made.grid, "seeds": made.seeds}
    made.file.write_text(f'{json.dumps(about)[:-1]}, "curves": {{\n{lines}\n}}}}\n')


def main() -> int:
    """Record one set."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    record(SETS[asked.set], asked.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
