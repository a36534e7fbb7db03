"""Where each rule ends: the outermost values that a configuration may hold, and the first that it may not."""

from typing import Any

import pytest

from cnnjepa.config import EncoderConfig, EncoderName, OptimizerName, TrainConfig, accumulation_steps, grid_size, method_module
from cnnjepa.rules import validate
from tests.support.tiny import tiny_config

INFINITY = float("inf")
# A key, values that are accepted and values that are not.
LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    ("seed", [0, 2**32 - 1], [-1, 2**32]),
    ("epochs", [1, 1_000_000], [0, 1_000_001]),
    ("threads", [1, 4096], [0, 4097]),
    ("micro_batch_size", [2, 16, 32], [1, 0, -2]),
    ("data.min_crop_scale", [1e-9, 1.0], [0.0, 1.0001]),
    ("data.flip_probability", [0.0, 1.0], [-0.01, 1.01]),
    ("data.eval_crop_fraction", [0.1, 1.0], [0.09, 1.01]),
    ("data.holdout_fraction", [0.001, 0.999], [0.0, 1.0]),
    ("data.train_limit", [0, 1], [-1]),
    ("data.test_limit", [0, 1], [-1]),
    ("data.workers", [0, 512], [-1, 513]),
    ("data.short_side", [0, 1], [-1]),
    ("data.jpeg_quality", [0, 100], [-1, 101]),
    ("data.channels", [1, 3], [0, 2, 4, 5, -1]),  # of digits, which are grey
    ("data.mean", [[], [0.0, 0.5, 1.0]], [[0.5], [0.5] * 4, [0.0, 0.5, 1.01], [-0.01, 0.5, 0.5]]),
    ("data.std", [[], [1e-9, 0.5, 7.0]], [[0.5], [0.5] * 4, [0.0, 0.5, 0.5], [0.5, 0.5, INFINITY]]),
    ("data.image_size", [24, 4096], [16, 8, 28, 4104]),  # 3 cells of 8 pixels a side
    ("encoder.width", [1, 4096], [0, 4097]),
    ("encoder.blocks", [1, 64], [0, 65]),
    ("optimizer.lr", [1e-12, 1e6], [0.0, -0.1, INFINITY]),
    ("optimizer.weight_decay", [0.0, 10.0], [-1e-9, INFINITY]),
    ("optimizer.beta1", [0.0, 0.9999], [-0.1, 1.0]),
    ("optimizer.beta2", [0.0, 0.9999], [-0.1, 1.0]),
    ("optimizer.warmup_epochs", [0.0, 1.99], [-0.1, 2.0]),  # of 2 epochs
    ("optimizer.final_lr_fraction", [0.0, 1.0], [-0.1, 1.1]),
    ("optimizer.momentum", [0.0, 0.9999], [-0.1, 1.0]),
    ("optimizer.trust_coefficient", [1e-9, 10.0], [0.0, INFINITY]),
    ("optimizer.final_weight_decay_fraction", [1e-9, 10.0], [0.0, INFINITY]),
    ("probes.feature_batch_size", [1, 1_000_000], [0, 1_000_001]),
    ("probes.linear_tolerance", [1e-5, 0.05], [9e-6, 0.051, INFINITY]),
    ("probes.linear_max_iterations", [1, 1_000_000], [0, 1_000_001]),
    ("probes.linear_paper_batch_size", [1, 1_000_000], [0, 1_000_001]),
    ("probes.linear_paper_epochs", [1, 100_000], [0, 100_001]),
    ("probes.knn_k", [1], [0]),
    ("probes.every_epochs", [0, 1], [-1]),
    ("probes.at_epochs", [[], [1]], [[0], [1, -1]]),
    ("probes.names", [[], ["knn"]], [["features"], ["none"]]),
    ("probes.collapsed_std", [0.0, 5.0], [-0.1, INFINITY]),
    ("probes.collapsed_rankme", [0.0, 5.0], [-0.1, INFINITY]),
    ("probes.linear_paper_lr", [1e-9, 5.0], [0.0, INFINITY]),
    ("probes.knn_temperature", [1e-9, 5.0], [0.0, INFINITY]),
    ("checkpoint.every_minutes", [0.0, 1e6], [-0.1]),
    ("checkpoint.keep", [2, 1_000_000], [1, 1_000_001]),
    ("log.every_steps", [1], [0]),
    ("warnings.feature_std", [0.0, 5.0], [-0.1, INFINITY]),
    ("warnings.knn_drop", [0.0, 5.0], [-0.1, INFINITY]),
    ("warnings.rankme_share", [0.0, 1.0], [-0.1, 1.1]),
    ("warnings.plateau_lr", [0.0, 1.0], [-0.1, 1.1]),
    ("warnings.plateau_share", [0.001, 1.0], [0.0, 1.1]),
    ("warnings.knn_probes", [1], [0]),
    ("method.ema.momentum_start", [0.0, 1.0], [-0.1, 1.1]),
    ("optimizer.max_gradient_norm", [0.0, 5.0], [-1.0, INFINITY]),
    ("optimizer.decay_fraction", [0.01, 0.99], [0.0, 1.0, -0.5]),
    ("method.ema.momentum_end", [0.0, 1.0], [-0.1, 1.1]),
    ("method.mask.mask_ratio", [0.001, 0.999], [0.0, 1.0]),
    ("method.mask.multi_block_probability", [0.0, 1.0], [-0.1, 1.1]),
    ("method.mask.blocks", [1, 1000], [0, 1001]),
    ("method.mask.block_scale_min", [0.001, 0.2], [0.0, 0.21]),
    ("method.mask.block_scale_max", [0.15, 0.999], [0.14, 1.0]),
    ("method.mask.block_aspect_min", [0.001, 1.5], [0.0, 1.51]),
    ("method.mask.block_aspect_max", [0.75, 1e6], [0.74, INFINITY]),
    ("method.predictor.depth", [1, 6], [0, 7]),
    ("method.predictor.kernel", [3, 9], [1, 4, 11]),
    ("method.predictor.width", [0.001, 8.0], [0.0, 8.1]),
]
# The same for other methods.
OF_METHODS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("simclr", "method.temperature", [1e-9, 10.0], [0.0, INFINITY]),
    ("simclr", "method.projection", [1, 65_536], [0, 65_537]),
    ("vicreg", "method.invariance", [0.0, 10.0], [-0.1, INFINITY]),
    ("vicreg", "method.depth", [1, 64], [0, 65]),
    ("byol", "method.hidden", [1, 65_536], [0, 65_537]),
    ("byol", "method.view1.min_crop_scale", [0.001, 1.0], [0.0, 1.01]),
    ("byol", "method.view2.hue", [0.0, 0.5], [-0.01, 0.51]),
    ("byol", "method.view2.contrast", [0.0, 3.0], [-0.01, INFINITY]),
    ("byol", "method.view1.solarise_probability", [0.0, 1.0], [-0.01, 1.01]),
    ("ijepa", "method.min_crop_scale", [0.001, 1.0], [0.0, 1.01]),
    ("ijepa", "method.predictor_width", [12, 8184], [0, 18, 8196]),
    ("ijepa", "method.mask.context_scale_max", [0.85, 1.0], [0.84, 1.01]),
    ("ijepa", "encoder.patch_size", [4, 8], [0, 16, 7]),
    ("ijepa", "encoder.vit_depth", [1, 64], [0, 65]),
    ("lejepa", "method.sigreg_weight", [0.0, 1.0], [-0.1, 1.1]),
    ("lejepa", "method.local_scale_max", [0.05, 1.0], [0.04, 1.01]),
    ("lejepa", "method.local_views", [0, 64], [-1, 65]),
    ("lejepa", "method.directions", [1, 65_536], [0, 65_537]),
    ("lejepa", "method.knots", [3, 1001], [1, 4, 1003]),
    ("lejepa", "method.local_size", [0, 8, 4096], [7, 4097]),
    ("spark", "method.mask_ratio", [0.01, 0.99], [0.0, 1.0]),
    ("spark", "method.decoder_width", [8, 65_536], [0, 12, 65_544]),
    ("spark", "method.min_crop_scale", [0.001, 1.0], [0.0, 1.01]),
    ("supervised", "method.classes", [0, 10], [9, 11, -1]),
]


def holder_of(config: TrainConfig, key: str) -> tuple[Any, str]:
    holder: Any = config
    *path, last = key.split(".")
    for name in path:
        holder = getattr(holder, name)
    assert hasattr(holder, last)
    return holder, last


def of_method(name: str) -> TrainConfig:
    config = tiny_config(method=method_module(name).Config(), micro_batch_size=32)
    if name == "ijepa":
        config.encoder = EncoderConfig(EncoderName.vit_tiny, patch_size=8)
    return config


CASES = [("cnn_jepa", *limits) for limits in LIMITS] + OF_METHODS


@pytest.mark.parametrize(("method", "key", "accepted", "refused"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_rule_ends_where_it_says(method: str, key: str, accepted: list[Any], refused: list[Any]) -> None:
    config = of_method(method)
    validate(config)
    holder, name = holder_of(config, key)
    for value in accepted:
        setattr(holder, name, value)
        validate(config)
    for value in refused:
        setattr(holder, name, value)
        with pytest.raises(ValueError, match="must") as caught:
            validate(config)
        assert "\n" not in str(caught.value)
        # How many cells there are is said of the image: patches are given.
        assert name in str(caught.value) or (name == "patch_size" and value), str(caught.value)


def test_lars_needs_a_decay_and_adamw_does_not() -> None:
    config = tiny_config()
    config.optimizer.weight_decay = 0.0
    validate(config)
    config.optimizer.name = OptimizerName.lars
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay must be positive with optimizer\.name=lars"):
        validate(config)
    config.optimizer.weight_decay = 1e-9
    validate(config)


def test_the_micro_batches_of_a_rank_are_the_global_batch_over_ranks_and_micro_batch() -> None:
    config = tiny_config(global_batch_size=48, micro_batch_size=8)
    assert [accumulation_steps(config, ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]
    for ranks in (4, 5, 12, 49):
        with pytest.raises(ValueError, match=r"global_batch_size must be"):
            accumulation_steps(config, ranks)
    config.micro_batch_size = 9
    with pytest.raises(ValueError, match="multiple of micro_batch_size x ranks, 9 x 1; got 48"):
        accumulation_steps(config, 1)


@pytest.mark.parametrize(
    ("name", "size", "cells"),
    [
        (EncoderName.resnet_small, 32, 4),
        (EncoderName.resnet18, 224, 7),
        (EncoderName.convnext_tiny, 96, 3),
        (EncoderName.vit_tiny, 224, 16),
    ],
)
def test_a_grid_has_a_cell_for_each_8_or_32_pixels_or_each_patch(name: EncoderName, size: int, cells: int) -> None:
    config = tiny_config(encoder=EncoderConfig(name))
    config.data.image_size = size
    assert grid_size(config) == cells
    config.data.image_size = size + 2
    with pytest.raises(ValueError, match=r"data\.image_size must be a multiple of"):
        grid_size(config)
