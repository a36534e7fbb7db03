"""Hold the linear probe against scikit-learn's LogisticRegression, on every trial of a sweep and on Fashion-MNIST.

    python tests/benchmarks/probe_agreement.py [SWEEP] [--json] [--images 1800 9000 36000] [--threads 2]

SWEEP is a sweep folder with completed runs (runs/predictor_ablation-smoke). Features are computed again from the final checkpoints; those
of Fashion-MNIST come from a random encoder. Both solvers get the same standardised features and the strength that the probe chose. At
C = 1, scikit-learn's default, held-out accuracy is compared too. Status 1 where predictions differ on more than 0.5 % of the images of a
set, objectives by more than 1e-4, or the mean difference from C = 1 is above 0.7 points.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _report import publish
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import nn

from cnnjepa.config import EncoderConfig, TrainConfig, method_module
from cnnjepa.data.datasets import Splits, load_splits
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.probes import _logistic
from cnnjepa.probes.features import ProbeData, probe_data
from cnnjepa.probes.linear import class_scores
from cnnjepa.references import random_encoder
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.run.ranks import Ranks
from cnnjepa.scoring import trained_encoder
from sweeps.state.folder import Sweep

HERE = Ranks(0, 1, torch.device("cpu"))
LEAST_AGREEMENT, MOST_APART, MOST_FROM_DEFAULT = 99.5, 1e-4, 0.7


@dataclass(frozen=True)
class Found:
    """How the two solvers compare on one set of features."""

    name: str
    images: int
    strength: float
    iterations: int
    agreement: float  # % of held-out and test images with the same guess
    apart: float  # of the objectives, relative
    ours: float  # held-out accuracy, %
    at_default: float  # scikit-learn's at C = 1


def compare(name: str, data: ProbeData) -> Found:
    """Fit both on the features of `data`."""
    assert data.test is not None
    probes, fit = data.config.probes, data.fit
    present, labels = fit.labels_N.unique(return_inverse=True)
    found, rows = _logistic.fit(fit.features_NC, labels, probes.linear_tolerance, probes.linear_max_iterations)
    judged = {"holdout": data.holdout, "test": data.test}
    x, count = rows.of(fit.features_NC).double().numpy(), len(labels)
    inputs = {part: rows.of(features.features_NC).double().numpy() for part, features in judged.items()}
    ours = {part: class_scores(found, rows, features, present, data.classes).argmax(1).numpy() for part, features in judged.items()}
    theirs = LogisticRegression(C=1 / found.strength, solver="newton-cholesky", tol=1e-8, max_iter=1000).fit(x, fit.labels_N.numpy())
    loss = -theirs.predict_log_proba(x)[np.arange(count), labels.numpy()].mean()
    objective = loss + found.strength / (2 * count) * (theirs.coef_**2).sum()
    same = np.concatenate([ours[part] == theirs.predict(inputs[part]) for part in judged])
    default = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-8, max_iter=1000).fit(x, fit.labels_N.numpy())
    truth = data.holdout.labels_N.numpy()
    return Found(
        name,
        count,
        found.strength,
        found.iterations,
        100 * float(same.mean()),
        abs(found.objective / objective - 1),
        100 * float((ours["holdout"] == truth).mean()),
        100 * float((default.predict(inputs["holdout"]) == truth).mean()),
    )


def features(encoder: nn.Module, config: TrainConfig, splits: Splits) -> ProbeData:
    """Return what the probes of a run of `config` see."""
    found = probe_data(encoder, config, splits, HERE, final=True)
    assert found is not None
    return found


def of_sweep(path: Path) -> list[Found]:
    """Compare on every completed trial of a sweep."""
    sweep, found = Sweep.load(path), []
    for trial in sweep.trials:
        folder = RunFolder(sweep.trial_dir(trial))
        result, last = folder.result(), checkpoint.newest_good(folder.checkpoints)
        if result is None or result.status is not RunStatus.completed or last is None:
            continue
        config = replace(trial.config, threads=torch.get_num_threads())
        encoder = trained_encoder(config, last, HERE.device)
        found.append(compare(f"{trial.label}, seed {trial.seed}", features(encoder, config, load_splits(config.data))))
    return found


def of_fashion(images: int) -> Found:
    """Compare on features of a random encoder."""
    data = replace(DATA_PRESETS["fashion_mnist"], train_limit=round(images / 0.9), test_limit=2000)
    config = TrainConfig(method=method_module("random").Config(), data=data, encoder=EncoderConfig(width=32))
    splits = load_splits(data)
    return compare(f"Fashion-MNIST, {len(splits.fit):,} images", features(random_encoder(config, splits, HERE), config, splits))


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", type=Path, metavar="SWEEP")
    parser.add_argument("--images", type=int, nargs="*", default=[1800, 9000, 36_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    of_trials = of_sweep(asked.sweep) if asked.sweep else []
    table = Table("features of", "images", "strength", "iterations", "same guess, %", "objectives apart", "held-out, %", "at C = 1, %")
    found = [*of_trials, *map(of_fashion, asked.images)]
    for f in found:
        shown = (f"{f.images:,}", f"{f.strength:.3g}", str(f.iterations), f"{f.agreement:.2f}", f"{f.apart:.1e}")
        table.add_row(f.name, *shown, f"{f.ours:.2f}", f"{f.at_default:.2f}")
    gain = statistics.fmean(f.ours - f.at_default for f in of_trials) if of_trials else 0.0
    figures = {
        "trials": len(of_trials),
        "least_agreement": min(f.agreement for f in found),
        "most_apart": max(f.apart for f in found),
        "mean_difference_from_default": gain,
        "sets": [vars(f) for f in found],
    }
    notes = [f"mean of held-out minus that at C = 1 over {len(of_trials)} trials: {gain:.2f} points"] if of_trials else []
    publish(asked.json, len(found), figures, table, notes)
    good = figures["least_agreement"] >= LEAST_AGREEMENT and figures["most_apart"] <= MOST_APART and abs(gain) <= MOST_FROM_DEFAULT
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
