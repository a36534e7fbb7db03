"""The one tiny configuration: it trains in seconds. OVERRIDES are its words for a command line, `tiny_config` makes it without one."""

import functools
from dataclasses import replace
from typing import Any

from cnnjepa.config import OptimizerConfig, TrainConfig, method_module
from cnnjepa.data_config import DATA_PRESETS

# digits, 8 channels, 4 epochs of 4 steps of 32 images; a checkpoint after every step.
TINY: dict[str, Any] = {
    "data.train_limit": 160,
    "data.test_limit": 60,
    "encoder.width": 8,
    "epochs": 4,
    "optimizer.warmup_epochs": 0.5,
    "global_batch_size": 32,
    "micro_batch_size": 16,
    "probes.linear_paper_epochs": 5,
    "checkpoint.every_minutes": 0.0,
    "log.every_steps": 1,
    "log.tensorboard": False,
}
# Of a key that is given twice the last value counts: [*OVERRIDES, "epochs=2"].
OVERRIDES = [f"{key}={str(value).lower()}" for key, value in TINY.items()]


def tiny_config(**changes: object) -> TrainConfig:
    """Return the configuration for 2 epochs, with images after each; `changes` replace whole fields."""
    config = TrainConfig(
        method=method_module("cnn_jepa").Config(), data=replace(DATA_PRESETS["digits"]), optimizer=OptimizerConfig(lr=0.002)
    )
    for key, value in {**TINY, "epochs": 2, "log.images_every_epochs": 1}.items():
        *path, last = key.split(".")
        setattr(functools.reduce(getattr, path, config), last, value)
    for key, value in changes.items():
        setattr(config, key, value)
    return config
