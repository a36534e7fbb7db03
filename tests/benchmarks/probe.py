"""What the linear probe costs: the path of strengths and the refit, on features of ImageNet-100's size.

    python tests/benchmarks/probe.py [--json] [--images 126689] [--channels 2048] [--classes 100] [--threads 2] [--streamed]

The features are synthetic: class means and correlated noise of a falling spectrum through a ReLU, so that the classes overlap, as those
of a ResNet do. Peak memory is the process's, the features among it. Status 1 where it takes 10 minutes or 6 GB at the default size.
The estimate for ImageNet-1k goes by the passes over the features, whose work grows with images x channels x classes.
"""

import argparse
import resource
import sys
import time

import torch
from _report import publish
from rich.table import Table
from torch import Tensor

from cnnjepa.probes import _logistic
from cnnjepa.probes._logistic import CHUNK_ROWS, Problem

MOST_SECONDS, MOST_GB = 600, 6
IMAGENET_1K = 1_281_167 * 0.98 * 1000  # fitted images x classes


def synthetic(images: int, channels: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return features [images, channels], non-negative as behind a ReLU, and labels, every class among them."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (images - classes,), generator=random)])
    rank = min(256, channels)
    spectrum = torch.arange(1, rank + 1) ** -0.5
    mixing = torch.randn(rank, channels, generator=random) * spectrum[:, None]
    means = torch.randn(classes, rank, generator=random)
    features = torch.empty(images, channels)
    for start in range(0, images, CHUNK_ROWS):
        part = labels[start : start + CHUNK_ROWS]
        latent = means[part] + 2.5 * torch.randn(len(part), rank, generator=random)
        noise = 0.3 * torch.randn(len(part), channels, generator=random)
        features[start : start + CHUNK_ROWS] = (latent @ mixing + noise).relu_()
    return features, labels


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    for name, default in (("images", 126_689), ("channels", 2048), ("classes", 100), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--streamed", action="store_true", help="keep no standardised copy of the features")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    held = min(5000, asked.images // 10)
    features, labels = synthetic(asked.images + held, asked.channels, asked.classes)
    fit, judged = features[: asked.images], features[asked.images :]
    passes, work = [0], [0]
    honest = Problem.evaluate

    def counted(self: Problem, weights: Tensor, alpha: float) -> tuple[float, Tensor]:
        passes[0] += 1
        work[0] += self.count
        return honest(self, weights, alpha)

    Problem.evaluate = counted  # type: ignore[method-assign]
    began = time.perf_counter()
    found, rows = _logistic.fit(fit, labels[: asked.images], 1e-3, 1000, keep=False if asked.streamed else None)
    seconds = time.perf_counter() - began
    right = torch.cat([found.scores(rows.of(part)).argmax(1) for part in judged.split(CHUNK_ROWS)]) == labels[asked.images :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {
        "seconds": seconds,
        "peak_gb": peak,
        "features_gb": features.numel() * 4 / 2**30,
        "passes": passes[0],
        "seconds_per_pass": seconds / passes[0],
        "gflops": 4 * work[0] * asked.channels * asked.classes / seconds / 1e9,
        "strength": found.strength,
        "relative_gradient": found.gradient,
        "refit_iterations": found.iterations,
        "top1": 100 * right.double().mean().item(),
        "imagenet1k_hours": seconds / 3600 * IMAGENET_1K * 2048 / (asked.images * asked.classes * asked.channels),
    }
    table = Table("figure", "value", title=f"linear probe, {asked.images:,} x {asked.channels:,}, {asked.classes} classes")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    publish(asked.json, 1, figures, table, [])
    default = (asked.images, asked.channels, asked.classes) == (126_689, 2048, 100)
    return 1 if default and (seconds >= MOST_SECONDS or peak >= MOST_GB) else 0


if __name__ == "__main__":
    sys.exit(main())
