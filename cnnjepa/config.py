"""The configuration of a run, with every default. Machines are configured in slurm/cluster.

The classes are plain dataclasses that OmegaConf accepts as schemas: no frozen classes, no Literal,
no tuple. A field marked `NEUTRAL` cannot change what a run computes and is not in the run ID.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from cnnjepa.data_config import ADDED, NEUTRAL, DataConfig, DatasetName
from cnnjepa.probe_config import EVALUATIONS, ProbeConfig
from cnnjepa.run.console import METHODS as OWN_METHODS
from cnnjepa.run.console import offered
from cnnjepa.run.ranks import Device

MIN_GRID = 3


class Precision(Enum):
    """Training precision; fp64 is for proofs of equality, bf16 is autocast."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class EncoderName(Enum):
    """Encoders in timm's keys; ResNets in torchvision's keys with timm's initialisation."""

    resnet18 = "resnet18"
    resnet34 = "resnet34"
    resnet50 = "resnet50"
    resnet101 = "resnet101"
    resnet152 = "resnet152"
    resnet200 = "resnet200"
    wide_resnet50_2 = "wide_resnet50_2"
    resnet_small = "resnet_small"  # halves its input 3 times, not 5
    convnext_tiny = "convnext_tiny"
    convnext_small = "convnext_small"
    convnext_base = "convnext_base"
    vit_tiny = "vit_tiny"
    vit_small = "vit_small"
    vit_base = "vit_base"


class Execution(Enum):
    """How hidden cells are left out, with equal results: tiled skips them, masked discards them."""

    tiled = "tiled"
    masked = "masked"


class PredictorConv(Enum):
    """Spatial operation of a predictor layer."""

    depthwise = "depthwise"
    dense = "dense"
    pointwise = "pointwise"


class OptimizerName(Enum):
    """AdamW; LARS (You et al. 2017) and LAMB (2020), which scale each weight's step by its norm."""

    adamw = "adamw"
    lars = "lars"
    lamb = "lamb"


class Schedule(Enum):
    """How a value goes from its start to its end over a run."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


def _is_digested(encoder: "EncoderConfig") -> bool:
    """Return whether the run ID has the content of the weights: their place is then of no consequence."""
    return bool(encoder.weights_digest)


@dataclass
class EncoderConfig:
    """The trained network; `width` and `blocks` apply only to resnet_small."""

    name: EncoderName = EncoderName.resnet_small
    width: int = 32  # channels of the first stage; each further stage doubles them
    blocks: int = 1  # residual blocks per stage
    sync_bn: bool = False  # batch statistics over all ranks instead of per micro-batch
    execution: Execution = field(default=Execution.tiled, metadata=NEUTRAL)
    compile: bool = field(default=False, metadata=NEUTRAL)  # torch.compile the parts of fixed shape: target encoder, predictor
    graphs: bool = field(default=False, metadata=NEUTRAL)  # CUDA graphs of both encoders, if they give the same results
    patch_size: int = field(default=14, metadata=ADDED)  # pixels per side; ViTs only
    vit_depth: int = field(default=12, metadata=ADDED)  # transformer blocks; ViTs only
    # What it starts from: a run folder, SWEEP_FOLDER/TRIAL, a .safetensors or torch file, torchvision:NAME or timm:NAME.
    weights: str = field(default="", metadata={"neutral": _is_digested, **ADDED})
    weights_keys: list[str] = field(default_factory=list, metadata={"neutral": _is_digested, **ADDED})
    weights_digest: str = field(default="", metadata=ADDED)  # of the tensors; filled in when the run is planned


@dataclass
class AugmentConfig:
    """Augmentations of joint-embedding methods, in this order; DataConfig has the flip."""

    min_crop_scale: float = 0.08  # smallest share of the image's area
    jitter_probability: float = 0.8
    brightness: float = 0.4  # strengths are as in torchvision
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grey_probability: float = 0.2
    blur_probability: float = 0.5  # sigma is uniform in 0.1 to 2 pixels at 224 pixels and scales with the view
    solarise_probability: float = 0.0  # inverts pixels brighter than half


@dataclass
class PredictorConfig:
    """The predictor of target features (paper, section III-C and ablation table III)."""

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


class RateSchedule(Enum):
    """What follows the warm-up: a cosine to the end of the run, or a stable phase and a short decay (wsd)."""

    cosine = "cosine"
    wsd = "wsd"


@dataclass
class OptimizerConfig:
    """AdamW, LARS or LAMB, with warm-up and decay by step; lr does not scale with the batch."""

    lr: float = 0.01
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_epochs: float = 10.0
    final_lr_fraction: float = 0.001
    name: OptimizerName = field(default=OptimizerName.adamw, metadata=ADDED)
    momentum: float = field(default=0.9, metadata=ADDED)  # lars
    trust_coefficient: float = field(default=0.001, metadata=ADDED)  # lars
    # True in the paper. If False, LARS and LAMB do not scale the steps of norms and biases either.
    decay_norms_and_biases: bool = field(default=True, metadata=ADDED)
    final_weight_decay_fraction: float = field(default=1.0, metadata=ADDED)  # reached by a cosine over the run, or over its decay
    schedule: RateSchedule = field(default=RateSchedule.cosine, metadata=ADDED)
    decay_fraction: float = field(default=0.2, metadata=ADDED)  # wsd: share of the run that its last phase takes
    max_gradient_norm: float = field(default=0.0, metadata=ADDED)  # larger gradients are scaled down to it; 0: none are


@dataclass
class CheckpointConfig:
    """When the run saves checkpoints; this does not change what is computed."""

    every_minutes: float = field(default=10.0, metadata=NEUTRAL)
    keep: int = field(default=2, metadata=NEUTRAL)


@dataclass
class LogConfig:
    """What a run logs."""

    every_steps: int = field(default=10, metadata=NEUTRAL)
    images_every_epochs: int = field(default=10, metadata=NEUTRAL)  # masked samples for TensorBoard; 0: none
    tensorboard: bool = field(default=True, metadata=NEUTRAL)


@dataclass
class WarningConfig:
    """Thresholds of early warnings (docs/guides/watching.md); they change no result."""

    # Held-out features at a probe, see probes/collapse.py. ProbeConfig holds the lower thresholds
    # at which the run fails.
    feature_std: float = 0.05
    rankme: float = 2.0
    rankme_share: float = 0.5  # of the best RankMe of the run's earlier probes
    # Each of the last `knn_probes` held-out k-NN scores is more than `knn_drop` points below the
    # best score before them.
    knn_drop: float = 5.0
    knn_probes: int = 2
    # The mean losses of the two halves of the last `plateau_share` of the run differ by less than
    # `plateau_change` of the loss, even after two standard errors are added.
    plateau_share: float = 0.2
    plateau_change: float = 0.005
    # Not checked below this share of the highest learning rate: a schedule's end is flat.
    plateau_lr: float = 0.5


@dataclass
class MethodConfig:
    """Base class of the Config in each file of cnnjepa/methods; `name` is the file's name."""

    name: str = ""
    title: ClassVar[str] = ""  # display name of the method
    # The loss compares images of the whole global batch: a rank must process its whole share in one
    # forward pass, with statistics over all ranks.
    global_batch: ClassVar[bool] = False

    @staticmethod
    def kind_of(values: Mapping[str, Any]) -> type["MethodConfig"]:
        """Return the class that the method named by `values` has for its keys."""
        kind: type[MethodConfig] = method_module(values["name"]).Config
        return kind

    def validate(self, config: "TrainConfig") -> None:
        """Raise ValueError with key, rule and value if this method cannot run under `config`."""


@dataclass
class TrainConfig:
    """One experiment: two equal TrainConfigs are the same run."""

    method: MethodConfig
    data: DataConfig = field(default_factory=DataConfig)  # cnnjepa/data_config.py
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    probes: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 42
    epochs: int = 200
    global_batch_size: int = 512  # images per optimiser step
    micro_batch_size: int = 128  # images per device and forward pass: the batch of BatchNorm statistics
    precision: Precision = Precision.fp32
    device: Device = field(default=Device.auto, metadata=NEUTRAL)
    threads: int = field(default=1, metadata=NEUTRAL)  # CPU threads per rank
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    warnings: WarningConfig = field(default_factory=WarningConfig, metadata=NEUTRAL)
    # Minutes without a step after which a job ends the run and starts it again; 0 derives them.
    hang_minutes: float = field(default=0.0, metadata=NEUTRAL)


VITS = (EncoderName.vit_tiny, EncoderName.vit_small, EncoderName.vit_base)

# Image pixels per side behind one cell of the last feature map. A ViT's cells are its patches.
CELL_PIXELS = {name: 8 if name is EncoderName.resnet_small else 32 for name in EncoderName if name not in VITS}


def file_names(package: str) -> list[str]:
    """Return the sorted public module names in a package folder; import none of them."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return sorted(m.name for m in pkgutil.iter_modules(found.submodule_search_locations) if not m.name.startswith("_"))


METHODS = "cnnjepa.methods"


@functools.cache
def _own_methods() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the methods of other packages, entry points by name; raise ValueError at a name that is taken."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    for point in offered(OWN_METHODS):
        if point.name in file_names(METHODS) or (point.name in found and found[point.name].value != point.value):
            other = found[point.name].value if point.name in found else f"{METHODS}.{point.name}"
            raise ValueError(
                f"an entry point of {OWN_METHODS} must have a name of its own; got {point.name} = {point.value} beside {other}"
            )
        found[point.name] = point
    return found


def method_names() -> list[str]:
    """Return the names of the methods: the files of cnnjepa/methods, and the entry points of other packages."""
    return sorted([*file_names(METHODS), *_own_methods()])


def method_module(name: str) -> Any:
    """Import a method, which defines `Config` (a MethodConfig) and `Method` (a BaseMethod)."""
    if name in file_names(METHODS):
        return importlib.import_module(f"{METHODS}.{name}")
    if name not in _own_methods():
        raise ValueError(f"method must be one of {', '.join(method_names())}; got {name}")
    return _own_method(name)


@functools.cache
def _own_method(name: str) -> Any:
    """Import a method of another package; raise ValueError if it is none."""
    point = _own_methods()[name]
    what = f"the entry point {name} = {point.value} of {OWN_METHODS} must name a module"
    try:
        found = importlib.import_module(point.value)
    except Exception as error:  # an import may raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{what} that can be imported; got {said}: correct it, or uninstall its package") from error
    kind = getattr(found, "Config", None)
    if not (isinstance(kind, type) and issubclass(kind, MethodConfig) and isinstance(getattr(found, "Method", None), type)):
        raise ValueError(f"{what} with Config, a MethodConfig, and Method, a BaseMethod; got {found.__file__} without one of them")
    if kind().name != name:
        raise ValueError(f"{what} whose Config has name: str = {name!r}; got {kind().name!r}")
    return found


def optimizer_presets() -> dict[str, OptimizerConfig]:
    """Return presets by name: OptimizerConfig() for each method, updated by its OPTIMIZERS."""
    presets: dict[str, OptimizerConfig] = {}
    for name in method_names():
        presets |= {name: OptimizerConfig(), **getattr(method_module(name), "OPTIMIZERS", {})}
    return presets


_NOT_A_PROBE = {"features"}
NEED_NO_LABELS = ("collapse",)  # probes that run on images without labels


def probe_names() -> list[str]:
    """Return the names of the probes: cnnjepa/probes without the shared feature pass."""
    return [n for n in file_names("cnnjepa.probes") if n not in _NOT_A_PROBE]


def own_probes(config: TrainConfig, final: bool = True) -> list[str]:
    """Return the names of the probes on the run's own set: without labels those that need none, before the end no evaluations."""
    is_labelled = config.data.name is not DatasetName.images
    names = [name for name in config.probes.names if final or name not in EVALUATIONS]
    return [name for name in names if is_labelled or name in NEED_NO_LABELS]


def grid_size(config: TrainConfig) -> int:
    """Return the last feature map's cells per side; raise ValueError unless they tile the image."""
    encoder, size = config.encoder, config.data.image_size
    cell = encoder.patch_size if encoder.name in VITS else CELL_PIXELS[encoder.name]
    if size < cell or size % cell:
        raise ValueError(f"data.image_size must be a multiple of the {config.encoder.name.name} cell of {cell} pixels; got {size}")
    return size // cell


def accumulation_steps(config: TrainConfig, ranks: int) -> int:
    """Return micro-batches per rank and optimiser step; raise ValueError if they do not divide."""
    micro_batches, rest = divmod(config.global_batch_size, config.micro_batch_size)
    if config.global_batch_size < ranks:
        raise ValueError(f"global_batch_size must be at least the number of ranks, {ranks}; got {config.global_batch_size}")
    if rest or micro_batches % ranks:
        raise ValueError(
            f"global_batch_size must be a multiple of micro_batch_size x ranks, {config.micro_batch_size} x {ranks}; "
            f"got {config.global_batch_size}"
        )
    return micro_batches // ranks
