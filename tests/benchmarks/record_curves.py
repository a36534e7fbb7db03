"""Train a grid of configurations to the end, over several seeds, and keep their probe curves: what tests/benchmarks/search.py replays.

python tests/benchmarks/record_curves.py        192 runs on digits, about 20 minutes on two cores; writes tests/benchmarks/curves.json

One file a run is kept beside it while it works, so that it can be stopped and started again.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from cnnjepa.run.folder import RunFolder
from cnnjepa.train import train
from jobs.config import compose_job

CURVES = Path(__file__).resolve().parent / "curves.json"
EPOCHS, PROBED, SEEDS = 27, [2, 3, 6, 9, 13], [42, 43, 44]
GRID = {
    "optimizer.lr": [0.001, 0.003, 0.01, 0.03],
    "method.ema.momentum_start": [0.9, 0.97, 0.99, 0.996],
    "method.mask.mask_ratio": [0.3, 0.5, 0.7, 0.9],
}
BASE = [
    "data=digits",
    "data.train_limit=1200",
    "data.holdout_fraction=0.4",
    "data.test_limit=60",
    "encoder.width=8",
    f"epochs={EPOCHS}",
    "optimizer.warmup_epochs=1",
    "global_batch_size=64",
    "micro_batch_size=64",
    "method.mask.strategy=random",
    "probes.names=[linear]",
    "checkpoint.every_minutes=1000",
    "log.tensorboard=false",
    "log.images_every_epochs=0",
]
METRIC = "linear.holdout_top1"


def key(values: tuple[float, ...], seed: int) -> str:
    """Names one run in the file."""
    return " ".join(f"{v:g}" for v in (*values, seed))


def run(values: tuple[float, ...], seed: int, parts: Path) -> None:
    """Train one configuration and keep its curve: epoch -> percent on the held-out part."""
    file = parts / key(values, seed).replace(" ", "_")
    if file.exists():
        return
    config = compose_job([*BASE, *(f"{k}={v}" for k, v in zip(GRID, values, strict=True)), f"seed={seed}"]).train
    config.probes.at_epochs = PROBED
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        folder.prepare(config)
        result = train(config, folder)
    assert result is not None
    curve = {epoch: round(metrics[METRIC], 2) for epoch, metrics in result.probes.items()}
    file.write_text(json.dumps({**curve, str(EPOCHS): round(result.metrics[METRIC], 2)}))


def main() -> None:
    """Train what is missing, on two processes, then write the one file."""
    parts = CURVES.with_suffix(".parts")
    parts.mkdir(exist_ok=True)
    wanted = [(values, seed) for seed in SEEDS for values in product(*GRID.values())]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(run, values, seed, parts) for values, seed in wanted]:
            future.result()
    curves = {key(v, s): json.loads((parts / key(v, s).replace(" ", "_")).read_text()) for v, s in wanted}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
    CURVES.write_text(
        f'{{"base": {json.dumps(BASE)}, "grid": {json.dumps(GRID)}, "seeds": {json.dumps(SEEDS)}, "curves": {{\n{lines}\n}}}}\n'
    )


if __name__ == "__main__":
    main()
