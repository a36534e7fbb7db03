"""Few labels, transfer and robustness of a finished run: what they take, and whether scikit-learn agrees.

    python tests/benchmarks/evaluations.py [RUN] [--json] [--threads 2] [--finetune]

Without RUN, a run on Fashion-MNIST is pretrained first (the quick budget of learning.py), which is not timed. `jobs.probe` then evaluates
it on its own set and on digits, in a process of its own, which is timed. Each draw of labelled images is fitted by scikit-learn too, on the
same features and with the same L2 strength. Status 1 where a mean over draws differs by more than 0.5 points, where a score is missing, or
where it took more than 10 minutes.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _report import publish
from learning import DATA, METHODS, Asked, settings
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import load_other, load_splits
from cnnjepa.data_config import other_set
from cnnjepa.probes import _draws, _logistic, label_fraction
from cnnjepa.probes.features import ProbeData, probe_data
from cnnjepa.run.files import read_json
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.ranks import Ranks
from cnnjepa.scoring import final_checkpoint, trained_encoder
from cnnjepa.task import sampling_error
from cnnjepa.train import train

HERE = Ranks(0, 1, torch.device("cpu"))
OTHER, ROBUSTNESS_IMAGES = "digits", 2000
MOST_APART, MOST_SECONDS = 0.5, 600.0  # points; two cores


def pretrained(path: Path) -> RunFolder:
    """Return a finished run on Fashion-MNIST."""
    config = settings(1, Asked(METHODS[0], DATA[0], "quick"))
    folder = RunFolder(path)
    folder.prepare(config)
    with contextlib.redirect_stdout(sys.stderr):  # --json prints one object and nothing else
        train(config, folder)
    return folder


def evaluated(run: Path, names: list[str]) -> float:
    """Evaluate by the command that a user types; return the seconds that it took."""
    words = [f"probes.names=[{','.join(names)}]", f"probes.data=[{OTHER}]", f"probes.robustness_images={ROBUSTNESS_IMAGES}"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jobs.probe", str(run), *words], check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def features(config: TrainConfig, folder: RunFolder) -> dict[str, ProbeData]:
    """Return what the evaluations saw of each set."""
    encoder = trained_encoder(config, final_checkpoint(folder), HERE.device)
    other = replace(config, data=other_set(OTHER, config.data))
    sets = {config.data.name.name: (config, load_splits(config.data)), OTHER: (other, load_other(OTHER, config.data))}
    found = {name: probe_data(encoder, of, splits, HERE, final=True) for name, (of, splits) in sets.items()}
    return {name: data for name, data in found.items() if data is not None}


def sizes_of(data: ProbeData) -> dict[str, tuple[dict[int, int], int]]:
    """Return the images of each class and the draws, by the start of the metrics' names."""
    probes, images = data.config.probes, _draws.counts(data.fit.labels_N)
    found = {f"few_shot.shots{n}": (dict.fromkeys(images, n), probes.few_shot_draws) for n in probes.few_shot_images}
    for percent in probes.label_fraction_percent:
        sizes = {label: max(round(percent / 100 * count), 1) for label, count in images.items()}
        found[f"label_fraction.{label_fraction.called(percent)}"] = (sizes, probes.label_fraction_draws)
    return found


def sklearns(data: ProbeData, images: torch.Tensor) -> float:
    """Return scikit-learn's test top-1 in percent, of the classifier that these images teach it."""
    assert data.test is not None
    few, labels = data.fit.features_NC[images], data.fit.labels_N[images].numpy()
    probes, classes = data.config.probes, torch.from_numpy(labels).unique(return_inverse=True)[1]
    found, rows = _logistic.fit(few, classes, probes.linear_tolerance, probes.linear_max_iterations)
    solver = LogisticRegression(C=1 / found.strength, tol=1e-8, max_iter=10_000).fit(rows.of(few).double().numpy(), labels)
    return 100 * float(solver.score(rows.of(data.test.features_NC).double().numpy(), data.test.labels_N.numpy()))


def files(folder: RunFolder) -> dict[str, float]:
    """Return all scores of a run, those under settings of their own among them."""
    result = folder.result()
    found = dict(result.metrics) if result is not None else {}
    for path in sorted((folder.path / "scores").glob("*.json")):
        found |= read_json(path)["metrics"]
    return found


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a finished run on Fashion-MNIST")
    parser.add_argument("--finetune", action="store_true", help="fine-tune too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    names = ["few_shot", "label_fraction", "robustness", *["finetune"] * asked.finetune]
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(asked.run) if asked.run else pretrained(Path(temporary) / "run")
        seconds = evaluated(folder.path, names)
        scores, config = files(folder), folder.config()
        rows: list[dict[str, Any]] = []
        for name, data in features(config, folder).items():
            part = f"{name}." if name == OTHER else ""
            for start, (sizes, draws) in sizes_of(data).items():
                probe, _, how = start.partition(".")
                ours = f"{probe}.{part}{how}"
                theirs = [sklearns(data, _draws.drawn(data.fit.labels_N, sizes, draw)) for draw in range(draws)]
                assert data.test is not None
                row = {"score": f"{ours}_test_top1", "value": scores.get(f"{ours}_test_top1"), "spread": scores.get(f"{ours}_test_spread")}
                rows.append({**row, "draws": draws, "images": len(data.test.labels_N), "sklearn": statistics.fmean(theirs)})
        others = {k: v for k, v in scores.items() if k.startswith(("robustness.", "finetune.")) and k.endswith("test_top1")}
        tested = {row["score"].split(".")[1] if row["score"].count(".") == 2 else "": row["images"] for row in rows}
        counted = {name: tested[OTHER if f".{OTHER}." in name else ""] for name in others}
    table = Table("score", "%", "std over draws", "draws", "test images", "scikit-learn, %")
    for row in rows:
        value, spread = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("value", "spread"))
        table.add_row(row["score"], value, spread, str(row["draws"]), f"{row['images']:,}", f"{row['sklearn']:.2f}")
    for name, score in others.items():
        images = min(counted[name], ROBUSTNESS_IMAGES)
        table.add_row(name, f"{score:.2f}", f"{sampling_error(score, images):.2f} (of the images)", "-", f"{images:,}", "-")
    missing = [row["score"] for row in rows if row["value"] is None]
    apart = max((abs(row["value"] - row["sklearn"]) for row in rows if row["value"] is not None), default=float("inf"))
    every = [f"{name}.{of}test_top1" for name in names[2:] for of in ("", f"{OTHER}.")]
    missing += [name for name in every if name not in others]
    figures = {"seconds": seconds, "most_apart": apart, "few_labels": rows, "others": others, "missing": missing}
    publish(asked.json, len(rows), figures, table, [f"{seconds:.0f} s for all of them; at most {apart:.2f} points from scikit-learn"])
    return 0 if apart <= MOST_APART and seconds <= MOST_SECONDS and not missing else 1


if __name__ == "__main__":
    sys.exit(main())
