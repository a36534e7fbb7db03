"""Check a configuration before anything starts; report key, rule and value in one line."""

import dataclasses
import math
from enum import Enum
from typing import Any

from cnnjepa.config import (
    MIN_GRID,
    VITS,
    AugmentConfig,
    EmaConfig,
    EncoderConfig,
    EncoderName,
    MethodConfig,
    OptimizerName,
    RateSchedule,
    TrainConfig,
    WarningConfig,
    accumulation_steps,
    grid_size,
    method_module,
    probe_names,
)
from cnnjepa.data_config import GREY_SETS, DataConfig, DatasetName, has_statistics, other_set
from cnnjepa.mask_config import BlockMaskConfig, MaskConfig


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key} must {rule}; got {value.name if isinstance(value, Enum) else value}")


# Upper bounds that catch typos before they cost queue time.
_LARGEST = {
    "data.image_size": 4096,
    "data.workers": 512,
    "encoder.width": 4096,
    "encoder.blocks": 64,
    "encoder.patch_size": 4096,
    "encoder.vit_depth": 64,
    "method.predictor_width": 8192,
    "method.predictor_depth": 64,
    "method.mask.blocks": 1000,
    "method.hidden": 65_536,
    "method.projection": 65_536,
    "method.width": 65_536,
    "method.depth": 64,
    "method.classes": 1_000_000,
    "method.global_views": 64,
    "method.local_views": 64,
    "method.local_size": 4096,
    "method.directions": 65_536,
    "method.knots": 1001,
    "method.decoder_width": 65_536,
    "probes.feature_batch_size": 1_000_000,
    "probes.linear_max_iterations": 1_000_000,
    "probes.linear_paper_epochs": 100_000,
    "probes.linear_paper_batch_size": 1_000_000,
    "micro_batch_size": 1_000_000,
    "checkpoint.keep": 1_000_000,
    "epochs": 1_000_000,
    "threads": 4096,
}
_WHOLE_NUMBERS_BELOW = 2**32


def validate_numbers(config: Any, path: str = "") -> None:
    """Raise ValueError for non-numbers, for integers that overflow, and for unreasonable sizes."""
    for f in dataclasses.fields(config):
        key, value = path + f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            validate_numbers(value, key + ".")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                _require(not math.isnan(number), key, "be a number", number)
            if isinstance(number, int) and not isinstance(number, bool):
                _require(abs(number) < _WHOLE_NUMBERS_BELOW, key, f"lie within {_WHOLE_NUMBERS_BELOW} of 0", number)
                if key in _LARGEST:
                    _require(number <= _LARGEST[key], key, f"be at most {_LARGEST[key]}", number)


def validate_mask(mask: MaskConfig, key: str, grid: int) -> None:
    """Raise ValueError unless each strategy leaves a visible and a hidden cell on the grid."""
    _require(0 < mask.mask_ratio < 1, f"{key}.mask_ratio", "lie in (0, 1)", mask.mask_ratio)
    p = mask.multi_block_probability
    _require(0 <= p <= 1, f"{key}.multi_block_probability", "lie in [0, 1]", p)
    _require(mask.blocks >= 1, f"{key}.blocks", "be at least 1", mask.blocks)
    low, high = mask.block_scale_min, mask.block_scale_max
    _require(0 < low <= high < 1, f"{key}.block_scale_min and block_scale_max", "satisfy 0 < min <= max < 1", f"{low} and {high}")
    low, high = mask.block_aspect_min, mask.block_aspect_max
    rule = "satisfy 0 < min <= max < infinity"
    _require(0 < low <= high < math.inf, f"{key}.block_aspect_min and block_aspect_max", rule, f"{low} and {high}")
    rule = f"give a grid of at least {MIN_GRID}x{MIN_GRID} cells for the mask"
    _require(grid >= MIN_GRID, "data.image_size", rule, f"a {grid}x{grid} grid")


def validate_block_mask(mask: BlockMaskConfig, key: str, grid: int) -> None:
    """Raise ValueError unless blocks of any drawn size fit a grid x grid map."""
    _require(mask.blocks >= 1, f"{key}.blocks", "be at least 1", mask.blocks)
    low, high = mask.target_scale_min, mask.target_scale_max
    _require(0 < low <= high < 1, f"{key}.target_scale_min and target_scale_max", "satisfy 0 < min <= max < 1", f"{low} and {high}")
    low, high = mask.target_aspect_min, mask.target_aspect_max
    rule = "satisfy 0 < min <= max < infinity"
    _require(0 < low <= high < math.inf, f"{key}.target_aspect_min and target_aspect_max", rule, f"{low} and {high}")
    low, high = mask.context_scale_min, mask.context_scale_max
    rule = "satisfy target_scale_max < min <= max <= 1"
    value = f"{low} and {high}"
    _require(mask.target_scale_max < low <= high <= 1, f"{key}.context_scale_min and context_scale_max", rule, value)
    rule = f"give a grid of at least {MIN_GRID}x{MIN_GRID} cells for the mask"
    _require(grid >= MIN_GRID, "data.image_size", rule, f"a {grid}x{grid} grid")


def require_encoder(config: TrainConfig, vit: bool) -> None:
    """Raise ValueError if the method is made for the other family of encoders."""
    names = [n.name for n in EncoderName if (n in VITS) is vit]
    rule = f"be one of {', '.join(names)} with method={config.method.name}"
    _require((config.encoder.name in VITS) is vit, "encoder.name", rule, config.encoder.name)


def validate_channels(data: DataConfig) -> None:
    """Raise ValueError unless `data` has images of so many channels, and a mean and a deviation for each."""
    channels, name = data.channels, data.name.name
    _require(channels in (1, 3, 4), "data.channels", "be 1 (grey), 3 (RGB) or 4 (files of four bands)", channels)
    if channels == 4:
        _require(data.name not in GREY_SETS, "data.channels", f"be 1 or 3 with {name}, whose images are grey", channels)
        _require(not data.short_side, "data.short_side", "be 0 with data.channels=4, since shrunk images are RGB", data.short_side)
    for key, values in (("mean", data.mean), ("std", data.std)):
        given = len(values) == channels or (not values and has_statistics(data))
        example = f"data.{key}=[{','.join([str({'mean': 0.5, 'std': 0.25}[key])] * channels)}]"
        numbers = f"{channels} number{'s' * (channels > 1)}, one per channel"
        rule = f"hold {numbers} of {name}, such as '{example}'"
        _require(given, f"data.{key}", rule, values)
    for value in data.mean:
        _require(0 <= value <= 1, "data.mean", "hold numbers in [0, 1]", value)
    for value in data.std:
        _require(0 < value < math.inf, "data.std", "hold positive and finite numbers", value)


def validate_augment(augment: AugmentConfig, key: str, channels: int) -> None:
    """Raise ValueError unless every probability, strength and scale of `augment` is valid, with so many channels."""
    _require(0 < augment.min_crop_scale <= 1, f"{key}.min_crop_scale", "lie in (0, 1]", augment.min_crop_scale)
    for name in ("jitter", "grey", "blur", "solarise"):
        p = getattr(augment, f"{name}_probability")
        _require(0 <= p <= 1, f"{key}.{name}_probability", "lie in [0, 1]", p)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(augment, name)
        _require(0 <= strength < math.inf, f"{key}.{name}", "be at least 0 and finite", strength)
    _require(0 <= augment.hue <= 0.5, f"{key}.hue", "lie in [0, 0.5]", augment.hue)
    rgb_only = {3: [], 1: ["grey_probability"]}.get(channels, ["jitter_probability", "grey_probability", "solarise_probability"])
    if channels == 1 and augment.jitter_probability:
        rgb_only += ["saturation", "hue"]  # brightness and contrast are those of any image
    for name in rgb_only:
        value = getattr(augment, name)
        _require(value == 0, f"{key}.{name}", f"be 0 with data.channels={channels}, since it changes RGB", value)


def validate_ema(ema: EmaConfig, key: str) -> None:
    """Raise ValueError unless both momenta lie in [0, 1]."""
    for name in ("momentum_start", "momentum_end"):
        momentum = getattr(ema, name)
        _require(0 <= momentum <= 1, f"{key}.{name}", "lie in [0, 1]", momentum)


def validate_sizes(config: MethodConfig, *names: str) -> None:
    """Raise ValueError unless each named width or depth of `config` is at least 1."""
    for name in names:
        value = getattr(config, name)
        _require(value >= 1, f"method.{name}", "be at least 1", value)


def validate_global_batch(config: TrainConfig, ranks: int) -> None:
    """Raise ValueError unless a loss over the global batch sees all of it, normalised as one."""
    name = config.method.name
    if config.method.global_batch:
        share = config.global_batch_size // ranks
        rule = f"be global_batch_size / ranks = {share} with {name}, whose loss compares the images of the whole batch"
        _require(accumulation_steps(config, ranks) == 1, "micro_batch_size", rule, config.micro_batch_size)
        rule = f"be true with {name} on {ranks} ranks, whose loss compares the images of the whole batch"
        _require(ranks == 1 or config.encoder.sync_bn, "encoder.sync_bn", rule, config.encoder.sync_bn)


def validate_warnings(warnings: WarningConfig) -> None:
    """Raise ValueError unless each threshold has a valid value."""
    for name in ("feature_std", "rankme", "knn_drop", "plateau_change"):
        value = getattr(warnings, name)
        _require(0 <= value < math.inf, f"warnings.{name}", "be at least 0 and finite", value)
    for name in ("rankme_share", "plateau_lr"):
        value = getattr(warnings, name)
        _require(0 <= value <= 1, f"warnings.{name}", "lie in [0, 1]", value)
    _require(0 < warnings.plateau_share <= 1, "warnings.plateau_share", "lie in (0, 1]", warnings.plateau_share)
    _require(warnings.knn_probes >= 1, "warnings.knn_probes", "be at least 1", warnings.knn_probes)


def validate(config: TrainConfig, ranks: int = 1) -> None:
    """Raise ValueError with key, rule and value if `ranks` ranks cannot train `config`."""
    data, optimizer, probes = config.data, config.optimizer, config.probes
    validate_numbers(config)
    for key in ("patch_size", "vit_depth"):
        value = getattr(config.encoder, key)
        _require(value >= 1, f"encoder.{key}", "be at least 1", value)
        alone = config.encoder.name in VITS or value == getattr(EncoderConfig, key)
        _require(alone, f"encoder.{key}", "keep its default, since it applies only to ViTs", value)
    grid_size(config)
    for key, count in (("epochs", config.epochs), ("global_batch_size", config.global_batch_size)):
        _require(count >= 1, key, "be at least 1", count)
    # BatchNorm over a single image's single cell has no variance.
    _require(config.micro_batch_size >= 2, "micro_batch_size", "be at least 2 for batch statistics", config.micro_batch_size)
    accumulation_steps(config, ranks)
    _require(0 <= config.seed < 2**32, "seed", "lie in [0, 2**32)", config.seed)
    _require(config.threads >= 1, "threads", "be at least 1", config.threads)
    _require(0 < data.min_crop_scale <= 1, "data.min_crop_scale", "lie in (0, 1]", data.min_crop_scale)
    _require(0 <= data.flip_probability <= 1, "data.flip_probability", "lie in [0, 1]", data.flip_probability)
    # The size of the resized image grows with the inverse of this fraction.
    _require(0.1 <= data.eval_crop_fraction <= 1, "data.eval_crop_fraction", "lie in [0.1, 1]", data.eval_crop_fraction)
    _require(0 < data.holdout_fraction < 1, "data.holdout_fraction", "lie in (0, 1)", data.holdout_fraction)
    _require(0 <= data.val_fraction < 1, "data.val_fraction", "lie in [0, 1)", data.val_fraction)
    rule = "be 0 with any set but imagefolder"
    _require(not data.val_fraction or data.name is DatasetName.imagefolder, "data.val_fraction", rule, data.val_fraction)
    for key, count in (
        ("train_limit", data.train_limit),
        ("test_limit", data.test_limit),
        ("workers", data.workers),
        ("short_side", data.short_side),
    ):
        _require(count >= 0, f"data.{key}", "be at least 0", count)
    validate_channels(data)
    _require(0 <= data.jpeg_quality <= 100, "data.jpeg_quality", "lie in [0, 100]", data.jpeg_quality)
    _require(config.encoder.width >= 1, "encoder.width", "be at least 1", config.encoder.width)
    _require(config.encoder.blocks >= 1, "encoder.blocks", "be at least 1", config.encoder.blocks)
    if config.encoder.name is not EncoderName.resnet_small:
        plain = EncoderConfig()
        for key in ("width", "blocks"):
            value = getattr(config.encoder, key)
            _require(value == getattr(plain, key), f"encoder.{key}", "keep its default, since it applies only to resnet_small", value)
    _require(optimizer.lr > 0 and math.isfinite(optimizer.lr), "optimizer.lr", "be a positive number", optimizer.lr)
    _require(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", "be at least 0 and finite", optimizer.weight_decay)
    for key, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        _require(0 <= beta < 1, f"optimizer.{key}", "lie in [0, 1)", beta)
    rule = f"lie in [0, epochs) with epochs={config.epochs}"
    _require(0 <= optimizer.warmup_epochs < config.epochs, "optimizer.warmup_epochs", rule, optimizer.warmup_epochs)
    _require(0 <= optimizer.final_lr_fraction <= 1, "optimizer.final_lr_fraction", "lie in [0, 1]", optimizer.final_lr_fraction)
    _require(0 <= optimizer.momentum < 1, "optimizer.momentum", "lie in [0, 1)", optimizer.momentum)
    for key, positive in (
        ("trust_coefficient", optimizer.trust_coefficient),
        ("final_weight_decay_fraction", optimizer.final_weight_decay_fraction),
    ):
        _require(0 < positive < math.inf, f"optimizer.{key}", "be positive and finite", positive)
    share = optimizer.decay_fraction
    _require(0 < share < 1, "optimizer.decay_fraction", "lie in (0, 1)", share)
    if optimizer.schedule is RateSchedule.wsd:
        rule = f"end before the decay, at {config.epochs * (1 - share):g} of {config.epochs} epochs, with optimizer.schedule=wsd"
        _require(optimizer.warmup_epochs <= config.epochs * (1 - share), "optimizer.warmup_epochs", rule, optimizer.warmup_epochs)
    most = optimizer.max_gradient_norm
    _require(0 <= most < math.inf, "optimizer.max_gradient_norm", "be at least 0 and finite", most)
    decayed = optimizer.name is OptimizerName.adamw or optimizer.weight_decay > 0
    rule = f"be positive with optimizer.name={optimizer.name.name}, which scales only decayed weights"
    _require(decayed, "optimizer.weight_decay", rule, optimizer.weight_decay)
    given = bool(config.encoder.weights) or not config.encoder.weights_digest
    _require(given, "encoder.weights", "be given with encoder.weights_digest, their digest", "none")
    for entry in config.encoder.weights_keys:
        _require("=" in entry, "encoder.weights_keys", "hold entries OLD=NEW, the beginnings of names", entry)
        _require(bool(config.encoder.weights), "encoder.weights", "be given with encoder.weights_keys", "none")
    if config.encoder.graphs:
        _require(config.method.name == "cnn_jepa", "encoder.graphs", "be false with any method but cnn_jepa", True)
        _require(not config.encoder.compile, "encoder.graphs", "be false with encoder.compile, which takes the same part", True)
        _require(ranks == 1 or not config.encoder.sync_bn, "encoder.graphs", "be false with encoder.sync_bn on several ranks", True)
    if config.encoder.compile:
        _require(config.method.name == "cnn_jepa", "encoder.compile", "be false with any method but cnn_jepa", config.encoder.compile)
        alone = ranks == 1 or not config.encoder.sync_bn
        _require(alone, "encoder.compile", "be false with encoder.sync_bn on several ranks", config.encoder.compile)
    for name in probes.names:
        _require(name in probe_names(), "probes.names", f"hold only names from {', '.join(probe_names())}", name)
    for entry in probes.data:
        validate_channels(other_set(entry, data))
    others = [entry.partition(":")[0] for entry in probes.data]
    _require(len(set(others)) == len(others), "probes.data", "name no set twice, since scores are named by it", ", ".join(probes.data))
    for key in ("feature_batch_size", "linear_max_iterations", "linear_paper_epochs", "linear_paper_batch_size", "knn_k"):
        _require(getattr(probes, key) >= 1, f"probes.{key}", "be at least 1", getattr(probes, key))
    # Weights in float32 allow no less; a guess at zero weights has the error 1.
    _require(1e-5 <= probes.linear_tolerance <= 0.05, "probes.linear_tolerance", "lie in [1e-5, 0.05]", probes.linear_tolerance)
    _require(probes.every_epochs >= 0, "probes.every_epochs", "be at least 0", probes.every_epochs)
    for epoch in probes.at_epochs:
        _require(epoch >= 1, "probes.at_epochs", "hold epochs of at least 1", epoch)
    for key, value in (("collapsed_std", probes.collapsed_std), ("collapsed_rankme", probes.collapsed_rankme)):
        _require(0 <= value < math.inf, f"probes.{key}", "be at least 0 and finite", value)
    for key, value in (("linear_paper_lr", probes.linear_paper_lr), ("knn_temperature", probes.knn_temperature)):
        _require(0 < value < math.inf, f"probes.{key}", "be positive and finite", value)
    probes.validate_evaluations()
    _require(0 <= config.hang_minutes <= 100_000, "hang_minutes", "lie in [0, 100000]; 0 derives it", config.hang_minutes)
    _require(config.checkpoint.every_minutes >= 0, "checkpoint.every_minutes", "be at least 0", config.checkpoint.every_minutes)
    _require(config.checkpoint.keep >= 2, "checkpoint.keep", "be at least 2: one may be damaged", config.checkpoint.keep)
    _require(config.log.every_steps >= 1, "log.every_steps", "be at least 1", config.log.every_steps)
    validate_warnings(config.warnings)
    method_module(config.method.name)
    config.method.validate(config)
    validate_global_batch(config, ranks)
