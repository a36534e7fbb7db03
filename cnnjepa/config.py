"""Every default of an experiment stands here, once; machines are in slurm/cluster, questions in sweeps.

The classes are plain dataclasses so that OmegaConf can take them as schemas: no frozen classes, no Literal, no tuple. A field
marked `NEUTRAL` cannot change what a run computes, and is left out of the signature that names the run.
"""

import importlib
import importlib.util
import math
import pkgutil
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

NEUTRAL = {"neutral": True}
ADDED = {"added": True}  # later than the first runs: at its default it is left out of the signature, so that their names stand
MIN_GRID = 3


class Precision(Enum):
    """fp64 is for proofs of equality; fp32 and bf16 (autocast) are for training."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Device(Enum):
    """auto takes a CUDA device where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DatasetName(Enum):
    """The sets that cnnjepa/data/datasets.py can read."""

    digits = "digits"
    fashion_mnist = "fashion_mnist"
    imagefolder = "imagefolder"
    imagenet100 = "imagenet100"
    imagenet1k = "imagenet1k"


class EncoderName(Enum):
    """ResNets with timm's initialisation and torchvision's keys; resnet_small halves its input 3 times, not 5. Others have timm's keys."""

    resnet18 = "resnet18"
    resnet34 = "resnet34"
    resnet50 = "resnet50"
    resnet101 = "resnet101"
    resnet152 = "resnet152"
    resnet200 = "resnet200"
    wide_resnet50_2 = "wide_resnet50_2"
    resnet_small = "resnet_small"
    convnext_tiny = "convnext_tiny"
    convnext_small = "convnext_small"
    convnext_base = "convnext_base"
    vit_tiny = "vit_tiny"
    vit_small = "vit_small"
    vit_base = "vit_base"


class Execution(Enum):
    """How hidden cells are left out: tiled never computes them, masked computes and discards them. Both come to the same result."""

    tiled = "tiled"
    masked = "masked"


class MaskStrategy(Enum):
    """mixed takes multi_block or random, one draw an iteration (paper, section III-B)."""

    multi_block = "multi_block"
    random = "random"
    mixed = "mixed"


class PredictorConv(Enum):
    """The spatial operation of one predictor layer."""

    depthwise = "depthwise"
    dense = "dense"
    pointwise = "pointwise"


class OptimizerName(Enum):
    """adamw decouples the decay; lars scales each weight's step by the ratio of its norm to its gradient's (You et al. 2017)."""

    adamw = "adamw"
    lars = "lars"


class Schedule(Enum):
    """How a value goes from its start to its end over a run."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class DataConfig:
    """One image set, how it is cut, and how a training view is drawn from an image."""

    name: DatasetName = DatasetName.digits
    root: str = field(default="", metadata=NEUTRAL)  # folder of the set; "" looks where the system keeps it
    image_size: int = 32  # pixels, training and probing
    min_crop_scale: float = 0.2  # smallest share of the image's area that a training crop may take
    flip_probability: float = 0.5
    eval_crop_fraction: float = 0.875  # the centre share of the resized image that a probe sees: 224 of 256
    train_limit: int = 0  # use the first so many training images of a fixed shuffle; 0 takes all
    test_limit: int = 0
    holdout_fraction: float = 0.1  # share of the training labels kept for selection
    workers: int = field(default=0, metadata=NEUTRAL)  # loader processes a rank


@dataclass
class EncoderConfig:
    """The network that is trained; `width` and `blocks` belong to resnet_small alone."""

    name: EncoderName = EncoderName.resnet_small
    width: int = 32  # channels of the first stage; each further stage doubles them
    blocks: int = 1  # residual blocks a stage
    sync_bn: bool = False  # batch statistics over all ranks instead of per micro-batch
    execution: Execution = field(default=Execution.tiled, metadata=NEUTRAL)
    compile: bool = field(default=False, metadata=NEUTRAL)  # torch.compile for what has fixed shapes: target encoder and predictor
    patch_size: int = field(default=14, metadata=ADDED)  # pixels a side; belongs to the ViTs alone, as does the next
    vit_depth: int = field(default=12, metadata=ADDED)  # transformer blocks


@dataclass
class AugmentConfig:
    """What a view of the joint-embedding methods goes through, in this order, beside the data's flip; strengths as torchvision's."""

    min_crop_scale: float = 0.08  # smallest share of the image's area
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_probability: float = 0.2
    blur_probability: float = 0.5  # sigma uniform in 0.1 to 2 pixels of a view of 224, and in proportion at other sizes
    solarise_probability: float = 0.0  # inverts what is brighter than half


@dataclass
class MaskConfig:
    """Which cells of the feature grid the context encoder may see (paper, section III-B)."""

    strategy: MaskStrategy = MaskStrategy.mixed
    mask_ratio: float = 0.6  # random: share of hidden cells
    multi_block_probability: float = 0.75  # mixed: share of iterations that use blocks
    blocks: int = 4  # multi_block: target blocks a sample
    block_scale_min: float = 0.15  # share of the grid's cells
    block_scale_max: float = 0.2
    block_aspect_min: float = 0.75  # height over width
    block_aspect_max: float = 1.5


@dataclass
class BlockMaskConfig:
    """The blocks of I-JEPA: what is to be predicted, and the larger block that it is predicted from."""

    blocks: int = 4  # target blocks a sample
    target_scale_min: float = 0.15  # share of the grid's cells
    target_scale_max: float = 0.2
    target_aspect_min: float = 0.75  # height over width
    target_aspect_max: float = 1.5
    context_scale_min: float = 0.85  # a square block, less what the targets cover
    context_scale_max: float = 1.0


@dataclass
class PredictorConfig:
    """Maps context features to target features (paper, section III-C and the ablation of table III)."""

    conv: PredictorConv = PredictorConv.depthwise
    depth: int = 3
    kernel: int = 3
    width: float = 1.0  # channels between layers as a multiple of the encoder's


@dataclass
class EmaConfig:
    """Momentum of the target encoder as a function of the optimiser step."""

    momentum_start: float = 0.996
    momentum_end: float = 1.0
    schedule: Schedule = Schedule.cosine


@dataclass
class OptimizerConfig:
    """AdamW or LARS with linear warm-up and cosine decay by step; the paper does not scale lr with the batch."""

    lr: float = 0.01
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_epochs: float = 10.0
    final_lr_fraction: float = 0.001
    name: OptimizerName = field(default=OptimizerName.adamw, metadata=ADDED)
    momentum: float = field(default=0.9, metadata=ADDED)  # lars
    trust_coefficient: float = field(default=0.001, metadata=ADDED)  # lars
    decay_norms_and_biases: bool = field(default=True, metadata=ADDED)  # the paper does; without, LARS does not scale their steps either
    final_weight_decay_fraction: float = field(default=1.0, metadata=ADDED)  # reached by a cosine over the run


@dataclass
class ProbeConfig:
    """How frozen features are judged: paper, section IV, but the headline is the last epoch and not the best."""

    names: list[str] = field(default_factory=lambda: ["linear", "knn", "collapse"])
    every_epochs: int = 0  # probe the held-out part while training; 0 probes at the end alone
    at_epochs: list[int] = field(default_factory=list, metadata=NEUTRAL)  # and after these epochs; a look changes nothing
    # A run whose features fall below either has collapsed and is failed: an even spread has std 1; rankme counts directions.
    collapsed_std: float = field(default=0.01, metadata=NEUTRAL)
    collapsed_rankme: float = field(default=1.2, metadata=NEUTRAL)
    batch_size: int = 256
    linear_epochs: int = 90
    linear_lr: float = 0.001
    knn_k: int = 200
    knn_temperature: float = 0.1


@dataclass
class CheckpointConfig:
    """When the run saves itself; none of it changes what is computed."""

    every_minutes: float = field(default=10.0, metadata=NEUTRAL)
    keep: int = field(default=2, metadata=NEUTRAL)


@dataclass
class LogConfig:
    """What a run tells while it goes."""

    every_steps: int = field(default=10, metadata=NEUTRAL)
    images_every_epochs: int = field(default=10, metadata=NEUTRAL)  # masked samples for TensorBoard; 0 for none
    tensorboard: bool = field(default=True, metadata=NEUTRAL)


@dataclass
class MethodConfig:
    """Base of the Config class that each file of cnnjepa/methods defines; `name` is the file's name."""

    name: str = ""
    # The loss compares images of the whole global batch: a rank must see its share at once, with statistics over all ranks.
    global_batch: ClassVar[bool] = False

    def validate(self, config: "TrainConfig") -> None:
        """Raise ValueError with key, rule and value where this method cannot run under `config`."""


@dataclass
class TrainConfig:
    """The experiment and nothing else: two equal TrainConfigs are the same run."""

    method: MethodConfig
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 42
    epochs: int = 200
    global_batch_size: int = 512  # images an optimiser step
    micro_batch_size: int = 128  # images a device and forward pass: the batch of the BatchNorm statistics
    precision: Precision = Precision.fp32
    device: Device = field(default=Device.auto, metadata=NEUTRAL)
    threads: int = field(default=1, metadata=NEUTRAL)  # CPU threads a rank
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


DATA_PRESETS: dict[str, DataConfig] = {
    # A mirrored digit is another sign, and cropping below half an 8x8 digit leaves nothing to tell it by.
    "digits": DataConfig(
        DatasetName.digits, image_size=32, min_crop_scale=0.5, flip_probability=0.0, eval_crop_fraction=1.0, holdout_fraction=0.2
    ),
    "fashion_mnist": DataConfig(DatasetName.fashion_mnist, image_size=32, eval_crop_fraction=1.0),
    "imagefolder": DataConfig(DatasetName.imagefolder, image_size=224),
    "imagenet100": DataConfig(DatasetName.imagenet100, image_size=224, holdout_fraction=0.05, workers=8),
    "imagenet1k": DataConfig(DatasetName.imagenet1k, image_size=224, holdout_fraction=0.02, workers=8),
}

VITS = (EncoderName.vit_tiny, EncoderName.vit_small, EncoderName.vit_base)

# Pixels of the image behind one cell of the last feature map, a side; a ViT's cells are its patches.
CELL_PIXELS = {name: 8 if name is EncoderName.resnet_small else 32 for name in EncoderName if name not in VITS}


def file_names(package: str) -> list[str]:
    """The public module names of a package folder: the file name is the registry. Nothing is imported but the package."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return sorted(m.name for m in pkgutil.iter_modules(found.submodule_search_locations) if not m.name.startswith("_"))


def method_names() -> list[str]:
    """Names of the methods: the files of cnnjepa/methods."""
    return file_names("cnnjepa.methods")


def method_module(name: str) -> Any:
    """The module of a method; it defines `Config` (a MethodConfig) and `Method` (an nn.Module)."""
    if name not in method_names():
        raise ValueError(f"method must be one of {', '.join(method_names())}; got {name}")
    return importlib.import_module(f"cnnjepa.methods.{name}")


def optimizer_presets() -> dict[str, OptimizerConfig]:
    """The optimisers by name: for each method that of its name, the default where its file has no OPTIMIZERS, and what else these hold."""
    presets: dict[str, OptimizerConfig] = {}
    for name in method_names():
        presets |= {name: OptimizerConfig(), **getattr(method_module(name), "OPTIMIZERS", {})}
    return presets


# What is no probe in cnnjepa/probes: the shared feature pass.
_NOT_A_PROBE = {"features"}


def probe_names() -> list[str]:
    """Names of the probes: the files of cnnjepa/probes less the shared feature pass."""
    return [n for n in file_names("cnnjepa.probes") if n not in _NOT_A_PROBE]


def grid_size(config: TrainConfig) -> int:
    """Cells a side of the last feature map; raises ValueError unless cells tile the image."""
    encoder, size = config.encoder, config.data.image_size
    cell = encoder.patch_size if encoder.name in VITS else CELL_PIXELS[encoder.name]
    if size < cell or size % cell:
        raise ValueError(f"data.image_size must be a multiple of the {config.encoder.name.name} cell of {cell} pixels; got {size}")
    return size // cell


def accumulation_steps(config: TrainConfig, ranks: int) -> int:
    """Micro-batches that one rank adds up for one optimiser step."""
    micro_batches, rest = divmod(config.global_batch_size, config.micro_batch_size)
    if config.global_batch_size < ranks:
        raise ValueError(f"global_batch_size must be at least the number of ranks, {ranks}; got {config.global_batch_size}")
    if rest or micro_batches % ranks:
        raise ValueError(
            f"global_batch_size must be a multiple of micro_batch_size x ranks, {config.micro_batch_size} x {ranks}; "
            f"got {config.global_batch_size}"
        )
    return micro_batches // ranks


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key} must {rule}; got {value.name if isinstance(value, Enum) else value}")


def validate_mask(mask: MaskConfig, key: str, grid: int) -> None:
    """Raise ValueError unless every strategy of `mask` leaves at least one visible and one hidden cell on a grid x grid map."""
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
    """Raise ValueError where the method is made for the other family of encoders."""
    names = [n.name for n in EncoderName if (n in VITS) is vit]
    rule = f"be one of {', '.join(names)} with method={config.method.name}"
    _require((config.encoder.name in VITS) is vit, "encoder.name", rule, config.encoder.name)


def validate_augment(augment: AugmentConfig, key: str) -> None:
    """Raise ValueError unless every probability, strength and scale of `augment` can be drawn by."""
    _require(0 < augment.min_crop_scale <= 1, f"{key}.min_crop_scale", "lie in (0, 1]", augment.min_crop_scale)
    for name in ("jitter", "grey", "blur", "solarise"):
        p = getattr(augment, f"{name}_probability")
        _require(0 <= p <= 1, f"{key}.{name}_probability", "lie in [0, 1]", p)
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(augment, name)
        _require(0 <= strength < math.inf, f"{key}.{name}", "be at least 0 and finite", strength)
    _require(0 <= augment.hue <= 0.5, f"{key}.hue", "lie in [0, 0.5]", augment.hue)


def validate_ema(ema: EmaConfig, key: str) -> None:
    """Raise ValueError unless both momenta lie in [0, 1]."""
    for name in ("momentum_start", "momentum_end"):
        momentum = getattr(ema, name)
        _require(0 <= momentum <= 1, f"{key}.{name}", "lie in [0, 1]", momentum)


def validate_sizes(config: MethodConfig, *names: str) -> None:
    """Raise ValueError unless each named whole number of `config`, a layer's width or a depth, is at least 1."""
    for name in names:
        value = getattr(config, name)
        _require(value >= 1, f"method.{name}", "be at least 1", value)


def validate_global_batch(config: TrainConfig, ranks: int) -> None:
    """Raise ValueError where a loss over the whole global batch would see less, or would see it normalised rank by rank."""
    name = config.method.name
    if config.method.global_batch:
        share = config.global_batch_size // ranks
        rule = f"be global_batch_size / ranks = {share} with {name}, whose loss compares the images of the whole batch"
        _require(accumulation_steps(config, ranks) == 1, "micro_batch_size", rule, config.micro_batch_size)
        rule = f"be true with {name} on {ranks} ranks, whose loss compares the images of the whole batch"
        _require(ranks == 1 or config.encoder.sync_bn, "encoder.sync_bn", rule, config.encoder.sync_bn)


def validate(config: TrainConfig, ranks: int = 1) -> None:
    """Raise ValueError, one line with key, rule and value, unless `config` can be trained on `ranks` ranks."""
    data, optimizer, probes = config.data, config.optimizer, config.probes
    for key in ("patch_size", "vit_depth"):
        value = getattr(config.encoder, key)
        _require(value >= 1, f"encoder.{key}", "be at least 1", value)
        alone = config.encoder.name in VITS or value == getattr(EncoderConfig, key)
        _require(alone, f"encoder.{key}", "be left alone, it shapes ViTs only", value)
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
    # The resized image grows with its inverse.
    _require(0.1 <= data.eval_crop_fraction <= 1, "data.eval_crop_fraction", "lie in [0.1, 1]", data.eval_crop_fraction)
    _require(0 < data.holdout_fraction < 1, "data.holdout_fraction", "lie in (0, 1)", data.holdout_fraction)
    for key, count in (("train_limit", data.train_limit), ("test_limit", data.test_limit), ("workers", data.workers)):
        _require(count >= 0, f"data.{key}", "be at least 0", count)
    _require(config.encoder.width >= 1, "encoder.width", "be at least 1", config.encoder.width)
    _require(config.encoder.blocks >= 1, "encoder.blocks", "be at least 1", config.encoder.blocks)
    if config.encoder.name is not EncoderName.resnet_small:
        plain = EncoderConfig()
        for key in ("width", "blocks"):
            value = getattr(config.encoder, key)
            _require(value == getattr(plain, key), f"encoder.{key}", "be left alone, it shapes resnet_small only", value)
    _require(optimizer.lr > 0 and math.isfinite(optimizer.lr), "optimizer.lr", "be a positive number", optimizer.lr)
    _require(0 <= optimizer.weight_decay < math.inf, "optimizer.weight_decay", "be at least 0 and finite", optimizer.weight_decay)
    for key, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        _require(0 <= beta < 1, f"optimizer.{key}", "lie in [0, 1)", beta)
    rule = f"lie in [0, epochs), epochs being {config.epochs}"
    _require(0 <= optimizer.warmup_epochs < config.epochs, "optimizer.warmup_epochs", rule, optimizer.warmup_epochs)
    _require(0 <= optimizer.final_lr_fraction <= 1, "optimizer.final_lr_fraction", "lie in [0, 1]", optimizer.final_lr_fraction)
    _require(0 <= optimizer.momentum < 1, "optimizer.momentum", "lie in [0, 1)", optimizer.momentum)
    for key, positive in (
        ("trust_coefficient", optimizer.trust_coefficient),
        ("final_weight_decay_fraction", optimizer.final_weight_decay_fraction),
    ):
        _require(0 < positive < math.inf, f"optimizer.{key}", "be positive and finite", positive)
    decayed = optimizer.name is not OptimizerName.lars or optimizer.weight_decay > 0
    _require(
        decayed,
        "optimizer.weight_decay",
        "be positive with optimizer.name=lars, which scales decayed weights alone",
        optimizer.weight_decay,
    )
    if config.encoder.compile:
        _require(config.method.name == "cnn_jepa", "encoder.compile", "be false with any method but cnn_jepa", config.encoder.compile)
        alone = ranks == 1 or not config.encoder.sync_bn
        _require(alone, "encoder.compile", "be false with encoder.sync_bn on several ranks", config.encoder.compile)
    for name in probes.names:
        _require(name in probe_names(), "probes.names", f"hold names out of {', '.join(probe_names())}", name)
    for key, count in (("batch_size", probes.batch_size), ("linear_epochs", probes.linear_epochs), ("knn_k", probes.knn_k)):
        _require(count >= 1, f"probes.{key}", "be at least 1", count)
    _require(probes.every_epochs >= 0, "probes.every_epochs", "be at least 0", probes.every_epochs)
    for epoch in probes.at_epochs:
        _require(epoch >= 1, "probes.at_epochs", "hold epochs from 1 on", epoch)
    for key, value in (("collapsed_std", probes.collapsed_std), ("collapsed_rankme", probes.collapsed_rankme)):
        _require(0 <= value < math.inf, f"probes.{key}", "be at least 0 and finite", value)
    for key, value in (("linear_lr", probes.linear_lr), ("knn_temperature", probes.knn_temperature)):
        _require(0 < value < math.inf, f"probes.{key}", "be positive and finite", value)
    _require(config.checkpoint.every_minutes >= 0, "checkpoint.every_minutes", "be at least 0", config.checkpoint.every_minutes)
    _require(config.checkpoint.keep >= 2, "checkpoint.keep", "be at least 2: one may be damaged", config.checkpoint.keep)
    _require(config.log.every_steps >= 1, "log.every_steps", "be at least 1", config.log.every_steps)
    method_module(config.method.name)
    config.method.validate(config)
    validate_global_batch(config, ranks)
