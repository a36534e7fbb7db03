"""CNN-JEPA and its baselines as a task (jobs/task.py). torch is imported only when it is needed."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjepa.config import (
    NEED_NO_LABELS,
    RateSchedule,
    TrainConfig,
    method_module,
    method_names,
    optimizer_presets,
    own_probes,
    probe_names,
)
from cnnjepa.data_config import DATA_PRESETS, OWN_SETS, DatasetName, other_set
from cnnjepa.probe_config import EVALUATIONS, ProbeConfig
from cnnjepa.rules import validate
from cnnjepa.run.folder import EarlyWarning, RunFolder, RunResult
from cnnjepa.run.identity import identity, lookup
from cnnjepa.run.losses import LossCurve
from cnnjepa.run.ranks import Device, pick_device
from cnnjepa.run.scores import Probed, Scores
from cnnjepa.suited import size_line
from cnnjepa.warnings import NEEDS, Probes, early_warnings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["validate"]

Config = TrainConfig
KEYS = {
    "threads": "threads",
    "device": "device",
    "data": "data",
    "weights": "encoder.weights",
    "data_root": "data.root",
    "fingerprint": "data.fingerprint",
    "workers": "data.workers",
    "batch": "global_batch_size",
    "warmup_epochs": "optimizer.warmup_epochs",
    "probes": "probes",
    "tensorboard": "log.tensorboard",
}
# Each method brings its own optimiser, unless another is given.
DEFAULTS = ("_self_", {"method": "cnn_jepa"}, {"optimizer": "${method}"}, {"data": "digits"})
# Keys of version 0.1, whose linear probe was the paper's alone.
RENAMED = {
    "probes.batch_size": "probes.feature_batch_size",
    "probes.linear_epochs": "probes.linear_paper_epochs",
    "probes.linear_lr": "probes.linear_paper_lr",
}
OBJECTIVE = "linear.holdout_top1"
HEADLINE = ("linear.test_top1", "knn.test_top1")
UNIT = "%"
RANKED = "Ranked on held-out training labels; the test split was read once, at the end of each run."
CURVES = (
    "loss",
    "linear.holdout_top1",
    "knn.holdout_top1",
    "collapse.feature_std",
    "collapse.rankme",
    "gradient_norm",
    "images_per_second",
)
WARNINGS = tuple(NEEDS)
# Keys that determine the hours of an epoch.
_SHAPE = ("data.name", "data.image_size", "data.train_limit", "encoder.name", "precision", "method.name", "global_batch_size")
# Hours per epoch, 51.5, 62.0, 67.6 and 79.3 GPU-hours / 200 epochs / 4 A100 (paper, table V), for
# Kaggle's ImageNet-100, which its authors link, at 224 pixels, ResNet-50, batch 512, bf16.
PAPER_HOURS_PER_EPOCH, PAPER_GPUS = {"cnn_jepa": 0.0644, "simclr": 0.0775, "vicreg": 0.0845, "byol": 0.0991}, 4
PAPER_SHAPE = {
    "data.name": "imagenet100_kaggle",
    "data.image_size": 224,
    "data.train_limit": 0,
    "encoder.name": "resnet50",
    "precision": "bf16",
}
_SOLVER = ("linear_tolerance", "linear_max_iterations")  # of each classifier that is fitted to features
_AT_THE_END = ("test_", "paper_protocol_")  # scores on images that no probe during training sees
_CHECKPOINT_HEAD = 2**20  # names and indices, at most


def groups() -> dict[str, dict[str, Any]]:
    """Return the presets of methods, optimisers and image sets."""
    methods = {name: method_module(name).Config for name in method_names()}
    return {"method": methods, "optimizer": dict(optimizer_presets()), "data": dict(DATA_PRESETS)}


def check(configs: Sequence[TrainConfig], ranks: int = 1) -> None:
    """Raise ValueError without a device, or without images for a step; load each image set once."""
    import cnnjepa.train  # noqa: F401
    from cnnjepa.data.check import cores
    from cnnjepa.data.datasets import load_splits
    from cnnjepa.data.loader import build_plan
    from cnnjepa.data.opened import require_decodable, sets_to_check

    # Import all that a run needs: runs forked from this process then start faster.
    for name in probe_names():
        importlib.import_module(f"cnnjepa.probes.{name}")
    images: dict[str, int] = {}
    for config in configs:
        pick_device(config.device)
        if (data := f"{config.data} {config.probes.data}") not in images:
            own = load_splits(config.data)
            images[data] = len(own.pretrain)
            for key, splits in sets_to_check(config, own):
                if ranks == 1 and config.probes.names:  # several ranks share that work once they run
                    require_decodable(splits, key, cores())
        build_plan(config, images[data], ranks)


def check_data(config: TrainConfig) -> str:
    """Return the image counts; raise ValueError if they differ from those of the whole set."""
    from cnnjepa.data.datasets import load_dataset, require_whole

    data, dataset = config.data, load_dataset(config.data)
    require_whole(data, dataset)
    return f"{data.name.name}: {dataset.counted} in {data.root or 'the default folder'}"


def check_gpu(config: TrainConfig, seconds: float) -> list[tuple[str, str, str]]:
    """Check this machine's GPU: cnnjepa/gpu_check.py."""
    from cnnjepa import gpu_check

    return gpu_check.check_gpu(config, seconds)


def identified(configs: Sequence[TrainConfig]) -> tuple[list[TrainConfig], list[str]]:
    """Return `configs` with the fingerprints of a user's own images and the digests of weights, and lines about both."""
    from cnnjepa.data.datasets import about, divide, load_dataset
    from cnnjepa.data.fingerprint import fingerprint

    found: list[TrainConfig] = []
    lines: list[str] = []
    known: dict[str, str] = {}
    digests: dict[str, str] = {}
    for config in configs:
        if config.encoder.weights:
            config = with_digest(config, digests, lines)
        data, asked = config.data, str(config.data)
        if data.name in OWN_SETS and asked not in known:
            dataset = load_dataset(data)
            known[asked] = fingerprint(dataset, data)
            data = replace(data, fingerprint=known[asked])
            lines += about(divide(dataset, data), data)
        left_out = [name for name in config.probes.names if name not in own_probes(config)]
        if left_out:
            where = "they run on probes.data" if config.probes.data else "probes.data=[NAME:ROOT] names a set with labels for them"
            lines.append(f"data={data.name.name} has no labels, and {' and '.join(left_out)} need some: {where}")
        lines += [line for line in [size_line(config)] if line]
        found.append(replace(config, data=replace(data, fingerprint=known[asked])) if asked in known else config)
    return found, list(dict.fromkeys(lines))


def with_digest(config: TrainConfig, known: dict[str, str], lines: list[str]) -> TrainConfig:
    """Return `config` with the digest of its weights; add what did not match to `lines`, and the digest to `known`.

    Raise ValueError where the weights do not fit the encoder, or are not those that `config` was planned with.
    """
    from cnnjepa import weights

    encoder = replace(config.encoder, weights=weights.located(config.encoder.weights))
    asked = f"{replace(encoder, weights_digest='')} {config.data.image_size} {config.data.channels}"
    if asked not in known:
        state, line = weights.loaded(encoder, config.data.image_size, config.data.channels)
        known[asked] = weights.digest(state)
        lines.append(line)
    if encoder.weights_digest not in ("", known[asked]):
        raise ValueError(weights.changed(encoder, known[asked]))
    return replace(config, encoder=replace(encoder, weights_digest=known[asked]))


def bytes_of_a_run(config: TrainConfig) -> int:
    """Return the bytes of a run's checkpoints, with one more while it is written, that of the stable phase and of fine-tuning."""
    import torch

    with torch.device("meta"):
        method = method_module(config.method.name).Method(config, total_steps=1)
    weights = sum(t.numel() * t.element_size() for t in method.state_dict().values())
    moments = sum(2 * 4 * p.numel() for p in method.parameters() if p.requires_grad)
    kept = config.checkpoint.keep + (config.optimizer.schedule is RateSchedule.wsd)
    if "finetune" in config.probes.names:  # its own weights and moments, and once more while they are written
        kept += 2
    return int(weights + moments + _CHECKPOINT_HEAD) * (kept + 1)


def continues(config: TrainConfig, shorter: TrainConfig) -> bool:
    """Return whether the two differ in nothing but the epochs, of which `config` has more, and decay at their end (wsd)."""
    alike = identity(replace(config, epochs=shorter.epochs)) == identity(shorter)
    return alike and config.epochs > shorter.epochs and config.optimizer.schedule is RateSchedule.wsd


def probed_at(config: TrainConfig, epochs: Sequence[int]) -> TrainConfig:
    """Return `config` with probes added after `epochs`."""
    return replace(config, probes=replace(config.probes, at_epochs=sorted({*config.probes.at_epochs, *epochs})))


def train(
    config: TrainConfig,
    folder: RunFolder,
    should_stop: Callable[[], bool],
    claim: int,
    judge: Callable[[int, dict[str, float]], str],
) -> RunResult | None:
    """Train `config` in `folder`: see cnnjepa/train.py."""
    from cnnjepa import train as loop

    return loop.train(config, folder, should_stop, claim, judge)


def cost_shape(values: Mapping[str, Any]) -> object:
    """Return data, network, precision, method and batch; the rest costs little."""
    return [lookup(values, key) for key in _SHAPE]


def published_cost(values: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the paper's GPU-hours per epoch and their source, or None for other runs."""
    hours = PAPER_HOURS_PER_EPOCH.get(str(lookup(values, "method.name")))
    if hours is None or any(lookup(values, key) != value for key, value in PAPER_SHAPE.items()):
        return None
    return hours * PAPER_GPUS, f"the paper's {hours} h on {PAPER_GPUS} A100"


def warnings(values: Mapping[str, Any], probes: Probes, losses: Callable[[float], LossCurve] | None) -> list[EarlyWarning]:
    """Return the warnings of cnnjepa/warnings.py."""
    return early_warnings(probes, losses(values["warnings"]["plateau_share"]) if losses else None, values)


def check_warning(name: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError if the probe that a warning needs does not run before the end."""
    probes, epochs = values["probes"], int(values["epochs"])
    if NEEDS[name] and NEEDS[name] not in probes["names"]:
        raise ValueError(f"probes.names must hold {NEEDS[name]} to prune on {name}; got {', '.join(probes['names']) or 'none'}")
    if not 0 < probes["every_epochs"] < epochs and not any(epoch < epochs for epoch in probes["at_epochs"]):
        rule = f"give a probe before epoch {epochs} to prune on {name}, which is checked at probes"
        raise ValueError(f"probes.every_epochs or probes.at_epochs must {rule}; got none: add 'probes.at_epochs=[{epochs // 2}]'")


def metrics(values: Mapping[str, Any], final: bool = True) -> list[str]:
    """Return the metrics of the configured probes, as each probe's METRICS lists them.

    They have a part more on the sets of `probes.data`, which are probed at the end alone, as the
    test split is.
    """
    names, found = values["probes"]["names"], []
    unlabelled = values["data"]["name"] == DatasetName.images.name
    sets = [""] + [f"{entry.partition(':')[0]}." for entry in values["probes"]["data"] if final]
    for name in names if final else [name for name in names if name not in EVALUATIONS]:
        module = importlib.import_module(f"cnnjepa.probes.{name}")
        declared = module.metrics(values["probes"]) if name in EVALUATIONS else getattr(module, "METRICS", ("*",))
        declared = [m for m in declared if final or not m.startswith(_AT_THE_END)]
        found += [f"{name}.{part}{m}" for part in sets for m in declared if part or not unlabelled or name in NEED_NO_LABELS]
    return found


def check_objective(metric: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError if the metric is a score by labels on the run's own set, which has none."""
    probe, _, rest = metric.partition(".")
    if values["data"]["name"] == DatasetName.images.name and probe in probe_names() and probe not in NEED_NO_LABELS and "." not in rest:
        instead = f"{probe}.NAME.{rest} with probes.data=[NAME:ROOT], or collapse.rankme"
        raise ValueError(f"a sweep's objective must be a score that needs no labels with data=images; got {metric}: use {instead}")


def sampling_error(score: float, images: int) -> float:
    """Return the standard error of a score in percent that the choice of its images gives it."""
    return math.sqrt(score * (100 - score) / images)


def title(name: str) -> str:
    """Return 'linear top-1, test' for 'linear.test_top1', else the name with spaces."""
    probe, _, rest = name.partition(".")
    if "_top" not in rest:
        return name.replace("_", " ").replace("collapse.", "")
    data, _, rest = rest.rpartition(".")
    part, _, score = rest.rpartition("_")
    how, _, tested = part.rpartition("_") if probe in EVALUATIONS else ("", "", part)
    where = {"holdout": "held-out", "paper_protocol": "test, best epoch"}.get(tested, tested) + (f" of {data}" if data else "")
    called = {"knn": "k-NN", "few_shot": "few-shot", "label_fraction": "few labels", "finetune": "fine-tuned"}.get(probe, probe)
    return f"{called} {score.replace('top', 'top-')}, {where}" + (f", {_condition(how)}" if how else "")


def _condition(how: str) -> str:
    """Return '5 images a class' for shots5, '1 % of the labels' for percent1, 'severity 3' for severity3, else the words."""
    for start, text in (("shots", "{} images a class"), ("percent", "{} % of the labels"), ("severity", "severity {}")):
        if how.startswith(start):
            return text.format(how.removeprefix(start).replace("_", "."))
    return how.replace("_", " ")


def is_pictured(metric: str) -> bool:
    """Return whether a figure adds anything to that of the top-1 score, and of robustness to that of all corruptions."""
    probe, _, rest = metric.partition(".")
    part_of_robustness = probe == "robustness" and not rest.rpartition(".")[2].startswith("test_")
    return not metric.endswith(("top5", "_spread", "draws", "_images", "train_loss")) and not part_of_robustness


def word(key: str, value: str) -> str:
    """Return the title of a method; other words explain themselves."""
    return str(method_module(value).Config.title) if key == "method" else value


def summary(values: Mapping[str, Any]) -> str:
    """Return a line such as 'data digits, encoder resnet_small, epochs 12, ...'."""
    shown = [f"{key} {values[key]}" for key in ("epochs", "global_batch_size", "precision")]
    return ", ".join([f"data {values['data']['name']}", f"encoder {values['encoder']['name']}", *shown])


def _settings(probes: ProbeConfig, name: str) -> dict[str, Any]:
    """Return what a probe's scores depend on; a key that begins with a probe's name is that probe's."""
    others = tuple(f"{other}_" for other in probe_names() if other != name)
    which = ("names", "every_epochs", "data")
    shared = _SOLVER if name in ("few_shot", "label_fraction", "robustness") else ()
    return {k: v for k, v in identity(probes).items() if k in shared or (k not in which and not k.startswith(others))}


def _sources(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Return the sets that are probed by name; the run's own is ""."""
    return {"": {}, **{entry.partition(":")[0]: identity(other_set(entry, config.data)) for entry in config.probes.data}}


def probed(config: TrainConfig, own: TrainConfig) -> list[Probed]:
    """Return each probe on the run's own set and on those of `probes.data`."""
    found, asked = [], _sources(own)
    for data, source in _sources(config).items():
        for name in config.probes.names if data else own_probes(config):
            settings = _settings(config.probes, name)
            is_own = settings == _settings(own.probes, name)
            found.append(Probed(name, data, settings, source, is_own, is_own and asked.get(data) == source))
    return found


def probe(config: TrainConfig, folder: RunFolder, wanted: Mapping[str, Sequence[str]]) -> Scores:
    """Run the probes of `wanted`, by data set, on the final checkpoint: cnnjepa/scoring.py."""
    from cnnjepa import scoring

    return scoring.probe(config, folder, wanted)


def encoder(config: TrainConfig, state: Mapping[str, Any]) -> "Module":
    """Return the probed encoder, with the weights of a checkpoint: images [B, C, S, S] to features [B, D, H, W]."""
    method = method_module(config.method.name).Method(config, total_steps=1)
    method.load_state_dict(state["method"])
    network: Module = method.probe_encoder
    return network


def features(config: TrainConfig, state: Mapping[str, Any], folder: Path, device: Device) -> "tuple[list[str], Tensor]":
    """Return the path of each image below `folder`, relative to it, and the features that the probes see, [N, D]."""
    from cnnjepa.probes._of_folder import features_of

    return features_of(encoder(config, state), config, folder, device)


def export(config: TrainConfig, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the probed encoder in torchvision's or timm's keys, and metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder(config, state).state_dict().items()}
    about = {"encoder": config.encoder.name.name, "method": config.method.name, "channels": str(config.data.channels)}
    return tensors, about
