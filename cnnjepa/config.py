"""Every default of an experiment stands here, once; machines are in slurm/cluster, questions in sweeps.

The classes are plain dataclasses so that OmegaConf can take them as schemas: no frozen classes, no Literal, no tuple. A field
marked `NEUTRAL` cannot change what a run computes, and is left out of the signature that names the run.
"""

import importlib
import importlib.util
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
    short_side: int = field(default=0, metadata=ADDED)  # pixels that a packed set was shrunk to, with the next; 0: images as they came
    jpeg_quality: int = field(default=0, metadata=ADDED)
    dct_scaling: bool = field(default=False, metadata=ADDED)  # decode at 1/2, 1/4 or 1/8 where every crop stays as large as its view


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
class WarningConfig:
    """From when on a run is said to be in trouble, before it has failed: docs/watching.md. Nothing here changes what is computed."""

    # Held-out features at a probe, see probes/collapse.py; at the lower thresholds of ProbeConfig the run is failed.
    feature_std: float = 0.05
    rankme: float = 2.0
    rankme_share: float = 0.5  # of the best RankMe of the run's earlier probes
    # The held-out k-NN score of each of the last so many probes is below the best before them by more than so many points.
    knn_drop: float = 5.0
    knn_probes: int = 2
    # The mean losses of the two halves of the last share of the run differ by less than this part of them, for certain.
    plateau_share: float = 0.2
    plateau_change: float = 0.005
    plateau_lr: float = 0.5  # not asked below this share of the highest learning rate: a schedule's end is flat


@dataclass
class MethodConfig:
    """Base of the Config class that each file of cnnjepa/methods defines; `name` is the file's name."""

    name: str = ""
    title: ClassVar[str] = ""  # what people call the method
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
    warnings: WarningConfig = field(default_factory=WarningConfig, metadata=NEUTRAL)


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
    """The module of a method; it defines `Config` (a MethodConfig) and `Method` (a BaseMethod)."""
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
