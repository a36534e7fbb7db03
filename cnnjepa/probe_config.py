"""How a run's features are evaluated: probes of frozen features, and evaluations at the end alone."""

import math
from dataclasses import dataclass, field

from cnnjepa.data_config import ADDED, NEUTRAL

# Probes that run when training has ended, and cost more than the others.
EVALUATIONS = ("few_shot", "finetune", "label_fraction", "robustness")
CORRUPTIONS = ("gaussian_noise", "impulse_noise", "gaussian_blur", "pixelate", "contrast", "brightness", "jpeg")


@dataclass
class ProbeConfig:
    """How frozen features are evaluated (paper, section IV).

    What begins with `linear_paper` is the paper's own linear probe, which decides nothing.
    """

    names: list[str] = field(default_factory=lambda: ["linear", "knn", "collapse"])
    every_epochs: int = 0  # probe the held-out part during training; 0 probes only at the end
    at_epochs: list[int] = field(default_factory=list, metadata=NEUTRAL)  # probe after these too; the run stays the same
    # A run whose features fall below either threshold has collapsed and fails. Evenly spread
    # features have std 1; rankme counts directions.
    collapsed_std: float = field(default=0.01, metadata=NEUTRAL)
    collapsed_rankme: float = field(default=1.2, metadata=NEUTRAL)
    feature_batch_size: int = 256  # images per forward pass
    # Linear probe: largest relative error of the weights, and the iterations within which it must be
    # reached (cnnjepa/probes/_logistic.py).
    linear_tolerance: float = 0.001
    linear_max_iterations: int = 1000
    linear_paper_epochs: int = 90
    linear_paper_batch_size: int = 512
    linear_paper_lr: float = 0.001
    knn_k: int = 200
    knn_temperature: float = 0.1
    # At the end also probe on these labelled sets, each a data preset as NAME or NAME:ROOT.
    data: list[str] = field(default_factory=list, metadata=ADDED)
    # Evaluations: probes that run at the end alone, where `names` holds them.
    few_shot_images: list[int] = field(default_factory=lambda: [1, 5, 10], metadata=ADDED)  # labelled images of each class
    few_shot_draws: int = field(default=5, metadata=ADDED)  # of these images
    label_fraction_percent: list[float] = field(default_factory=lambda: [1.0, 10.0], metadata=ADDED)  # of each class's labels
    label_fraction_draws: int = field(default=3, metadata=ADDED)
    # Fine-tuning: AdamW, linear warm-up, then a cosine to zero.
    finetune_epochs: int = field(default=20, metadata=ADDED)
    finetune_warmup_epochs: float = field(default=2.0, metadata=ADDED)
    finetune_batch_size: int = field(default=128, metadata=ADDED)  # images per step over all ranks
    finetune_lr: float = field(default=0.001, metadata=ADDED)
    finetune_weight_decay: float = field(default=0.05, metadata=ADDED)
    robustness_corruptions: list[str] = field(default_factory=lambda: list(CORRUPTIONS), metadata=ADDED)
    robustness_severities: list[int] = field(default_factory=lambda: [1, 3, 5], metadata=ADDED)  # of 1 to 5
    robustness_images: int = field(default=0, metadata=ADDED)  # the first so many test images of a fixed shuffle; 0: all

    def validate_evaluations(self) -> None:
        """Raise ValueError at a setting of an evaluation that cannot be."""
        for key, values, least, most in (
            ("few_shot_images", self.few_shot_images, 1, 1_000_000),
            ("few_shot_draws", [self.few_shot_draws], 1, 1000),
            ("label_fraction_draws", [self.label_fraction_draws], 1, 1000),
            ("finetune_epochs", [self.finetune_epochs], 1, 100_000),
            ("finetune_batch_size", [self.finetune_batch_size], 1, 1_000_000),
            ("robustness_severities", self.robustness_severities, 1, 5),
            ("robustness_images", [self.robustness_images], 0, 1_000_000_000),
        ):
            for value in values:
                _require(least <= value <= most, key, f"lie in [{least}, {most}]", value)
        for share in self.label_fraction_percent:
            _require(0 < share <= 100, "label_fraction_percent", "lie in (0, 100]", share)
        for key in ("few_shot_images", "label_fraction_percent", "robustness_corruptions", "robustness_severities"):
            values = getattr(self, key)
            _require(bool(values), key, "hold at least one value", "none")
            _require(len(set(values)) == len(values), key, "hold no value twice", ", ".join(map(str, values)))
        for name in self.robustness_corruptions:
            _require(name in CORRUPTIONS, "robustness_corruptions", f"hold only {', '.join(CORRUPTIONS)}", name)
        _require(0 < self.finetune_lr < math.inf, "finetune_lr", "be positive and finite", self.finetune_lr)
        decay = self.finetune_weight_decay
        _require(0 <= decay < math.inf, "finetune_weight_decay", "be at least 0 and finite", decay)
        warmup, epochs = self.finetune_warmup_epochs, self.finetune_epochs
        _require(0 <= warmup < epochs, "finetune_warmup_epochs", f"lie in [0, {epochs}), below finetune_epochs", warmup)


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"probes.{key} must {rule}; got {value}")
