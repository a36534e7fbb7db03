"""Check a GPU with the trainer itself: equal results, steps that repeat, a run that resumes, and the pace of a step.

Every check is a function of a `Check` that adds findings: (level, what, said), with the levels of
`python -m jobs.preflight`, which calls this through the task.
"""

import contextlib
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import (
    VITS,
    EncoderConfig,
    EncoderName,
    Execution,
    LogConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.mask_config import MaskConfig
from cnnjepa.masking import draw_visible
from cnnjepa.methods._base import build_method, weights_dtype
from cnnjepa.methods.cnn_jepa import Config as CnnJepa
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import ResNet, build_encoder
from cnnjepa.models.tiles import encode_tiles
from cnnjepa.monitoring.traffic import Traffic
from cnnjepa.optim import build_optimizer
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.ranks import Device
from cnnjepa.train import train

Finding = tuple[str, str, str]
EXACT = 1e-9  # of the largest value, in float64
_WARM_STEPS, _MEASURED_SECONDS = 15, 5.0
_HOST_BOUND = 0.9  # share of a step in which the host still launches
_FASTER = 1.05  # from where another execution is advised


@dataclass
class Check:
    """What is checked, on which device, and what was found."""

    config: TrainConfig
    device: torch.device
    deadline: float  # of time.monotonic
    found: list[Finding] = field(default_factory=list)
    bandwidth: float = 0.0  # bytes per second of a copy, read and written

    def require(self, holds: bool, what: str, said: str, otherwise: str = "problem") -> None:
        """Add a finding."""
        self.found.append(("ok" if holds else otherwise, what, said))

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds_of(check: Check, do: Callable[[], object], times: int) -> float:
    """Return the seconds of one of `times` calls, after one that warms up."""
    do()
    check.wait()
    began = time.perf_counter()
    for _ in range(times):
        do()
    check.wait()
    return (time.perf_counter() - began) / times


def bandwidth(check: Check) -> None:
    """Measure how many bytes per second a copy kernel reads and writes."""
    size = 2**30 if check.device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    check.bandwidth = 2 * size / seconds_of(check, lambda: target.copy_(source), 10)
    check.require(math.isfinite(check.bandwidth), "bandwidth", f"a copy kernel moves {check.bandwidth / 1e12:.2f} TB/s")


def apart(a: Tensor, b: Tensor, at_least: float = 0.0) -> float:
    """Return the largest difference over the largest value; infinity unless both are finite."""
    found = ((a - b).abs().max() / max(b.abs().max().item(), at_least, 1e-30)).item()
    return found if math.isfinite(found) else math.inf


def executions_apart(device: torch.device, name: EncoderName = EncoderName.resnet_small) -> float:
    """Return how far tiled and masked execution are apart in float64: features, gradients and statistics."""
    tiled: ResNet = build_encoder(EncoderConfig(name), 0).double().to(device).to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        for block in tiled.blocks():  # a new block is the identity, and its branch would have no gradient
            block.branch[-1][1].weight.fill_(0.5)
    masked = copy.deepcopy(tiled)
    masked.execution = Execution.masked
    visible = Visibility(torch.from_numpy(draw_visible(MaskConfig(), 4, 0, 0, np.arange(4))), device)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 4 * tiled.cell, 4 * tiled.cell, dtype=torch.float64, generator=random).to(device)
    # Not `tiled(...)`, which takes masked execution for so few cells on CUDA.
    features = encode_tiles((tiled.conv1, tiled.bn1), tiled.small, tiled.blocks(), images, visible)
    expected = masked(images, visible)
    weights = torch.randn(features.shape, dtype=torch.float64, generator=random).to(device)
    for out in (features, expected):
        (out * weights).sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(tiled.parameters(), masked.parameters(), strict=True)]
    largest = 1e-3 * max(q.abs().max().item() for _, q in pairs if q is not None)  # some gradients are sums that cancel
    found = [apart(features, expected)]
    found += [apart(p, q, largest) for p, q in pairs if p is not None and q is not None]
    return max(found + [apart(a.double(), b.double()) for a, b in zip(tiled.buffers(), masked.buffers(), strict=True)])


def exact(check: Check) -> None:
    """Hold tiled execution against masked execution."""
    worst = executions_apart(check.device)
    said = f"tiled and masked execution are at most {worst:.1e} apart in float64"
    check.require(worst <= EXACT, "exact", said if worst <= EXACT else f"{said}, more than {EXACT:g}: use encoder.execution=masked")


class Training:
    """Steps of a method on images that are on the device, as cnnjepa/train.py makes them, without a loader."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        """Build method and optimiser of `config`, and one micro-batch of random images."""
        self.config, self.device, self.step = config, device, 0
        self.method = build_method(config, 1000, device)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        batch, random = config.micro_batch_size, torch.Generator().manual_seed(0)
        shapes = [(batch, config.data.channels, view.size, view.size) for view in self.method.views(config)]
        self.views = [torch.randn(shape, generator=random).to(device, weights_dtype(config)) for shape in shapes]
        self.views = [view.to(memory_format=torch.channels_last) for view in self.views]
        self.labels = torch.zeros(batch, dtype=torch.long, device=device)

    def launch(self) -> None:
        """Begin a step: forward and backward pass."""
        self.optimizer.zero_grad()
        torch.manual_seed(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision is Precision.bf16):
            loss = self.method(Batch(self.views, self.step, np.arange(len(self.labels)), self.labels))["loss"]
        loss.backward()

    def finish(self) -> None:
        """End the step; the host reads the gradient norm, as the trainer does."""
        torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).item()
        self.optimizer.step()
        self.method.after_step(self.step)
        self.step += 1

    def run(self, steps: int = 1) -> "Training":
        """Make so many steps."""
        for _ in range(steps):
            self.launch()
            self.finish()
        return self

    def resumed(self) -> "Training":
        """Return another training that continues from the state of this one."""
        other = Training(self.config, self.device)
        other.method.load_state_dict(copy.deepcopy(self.method.state_dict()))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.step = self.step
        return other

    def apart(self, other: "Training") -> float:
        """Return the largest relative difference of any weight or statistic."""
        pairs = zip(self.method.state_dict().values(), other.method.state_dict().values(), strict=True)
        return max(apart(a.double(), b.double()) for a, b in pairs)


def small_config(device: torch.device, **changes: Any) -> TrainConfig:
    """Return a run on digits that takes seconds."""
    data = replace(DATA_PRESETS["digits"], train_limit=160, test_limit=60)
    # A few steps make no features worth a judgement.
    probes = ProbeConfig(names=["knn"], collapsed_std=0.0, collapsed_rankme=0.0)
    config = TrainConfig(CnnJepa(), data, optimizer=OptimizerConfig(lr=0.002, warmup_epochs=0.5), probes=probes, log=LogConfig(1, 0, False))
    precision = Precision.bf16 if device.type == "cuda" else Precision.fp32  # which a CPU may emulate
    sizes = {"epochs": 4, "global_batch_size": 32, "micro_batch_size": 32, "precision": precision}
    return replace(config, device=Device[device.type], encoder=EncoderConfig(width=8), **{**sizes, **changes})


def repeats(check: Check) -> None:
    """Make steps twice, and once with a restored state between them."""
    config = small_config(check.device)
    whole, again = (Training(config, check.device).run(6) for _ in range(2))
    resumed = Training(config, check.device).run(3).resumed().run(3)
    twice, after = whole.apart(again), whole.apart(resumed)
    check.require(twice == 0, "repeats", f"6 steps made twice are {twice:.1e} apart", "warning")
    same = after == 0 or twice > 0
    check.require(same, "restores", f"6 steps, and 3 + 3 with a restored state between them, are {after:.1e} apart")


def losses(folder: RunFolder) -> list[float]:
    """Return the losses of a run's step records, in order."""
    records = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if r["kind"] == "step"]


def runs(check: Check) -> None:
    """Train on digits from the start to the probes; then once more, stopped halfway and resumed."""
    config = small_config(check.device)
    steps = config.epochs * (config.data.train_limit // config.global_batch_size)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as place:
        whole, parts = (RunFolder(Path(place) / name) for name in ("whole", "parts"))
        for folder in (whole, parts):
            folder.prepare(config)
        asked = iter(range(steps))
        with contextlib.redirect_stdout(io.StringIO()):  # their progress is of no interest
            result = train(config, whole)
            stopped = train(config, parts, lambda: next(asked) >= steps // 2)
            resumed = train(config, parts)
        good = result is not None and stopped is None and resumed is not None and resumed.resumes == 1
        one, other = losses(whole), losses(parts)
    values = len(one) == len(other) > 0 and all(map(math.isfinite, one))
    check.require(good and values, "run", f"{len(one)} steps on digits and their probes, and {len(other)} stopped halfway and resumed")
    first = next((i + 1 for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    said = f"the losses differ from step {first} on" if first else "the resumed run has the losses of the undisturbed one, bit for bit"
    check.require(not first, "resumes", said, "warning")


def bytes_of_a_step(check: Check, config: TrainConfig) -> int:
    """Return what the ops of a step read and write, computed; a captured or compiled part would hide its ops."""
    config = replace(config, encoder=replace(config.encoder, graphs=False, compile=False))
    training = Training(config, check.device).run()  # the first step makes the optimiser's averages
    with Traffic() as traffic:
        training.run()
    return sum(m.bytes for m in traffic.found)


def pace_of(check: Check, config: TrainConfig) -> dict[str, float]:
    """Measure steps of `config`: images per second, share in which the host launches, peak bytes, bytes moved."""
    training = Training(config, check.device)
    cuda = check.device.type == "cuda"
    training.run(_WARM_STEPS if cuda else 1)
    check.wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats(check.device)
    began, steps, launching = time.perf_counter(), 0, 0.0
    seconds = min(_MEASURED_SECONDS if cuda else 0.0, max(0.0, (check.deadline - time.monotonic()) / 4))
    while not steps or time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        training.launch()
        launching += time.perf_counter() - asked
        training.finish()
        steps += 1
    check.wait()
    took = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated(check.device) if cuda else 0
    del training
    moved = bytes_of_a_step(check, config)
    return {"pace": config.micro_batch_size / took, "host": launching / steps / took, "peak": peak, "bytes": moved, "seconds": took}


def described(config: TrainConfig) -> str:
    """Return the step in words."""
    execution = "" if config.encoder.name in VITS else f", {config.encoder.execution.name}"
    return f"{config.method.name}, {config.encoder.name.name}{execution}, {config.precision.name}, micro-batch {config.micro_batch_size}"


def pace(check: Check) -> None:
    """Measure the configured step, and say what to change."""
    config, card = check.config, torch.cuda.get_device_name(check.device) if check.device.type == "cuda" else "CPU"
    own = pace_of(check, config)
    share = own["bytes"] / own["seconds"] / check.bandwidth if check.bandwidth else math.nan
    rate = f"{own['pace']:,.0f} images/s on one {card} ({described(config)}, no loader, n = 1)"
    said = f"{rate}; {own['bytes'] / config.micro_batch_size / 1e6:.0f} MB per image computed, {share:.0%} of the measured bandwidth"
    check.require(True, "pace", f"{said}; peak {own['peak'] / 2**30:.1f} GiB")
    advice = []
    if "resnet" in config.encoder.name.name and config.method.name == "cnn_jepa":
        instead = Execution.masked if config.encoder.execution is Execution.tiled else Execution.tiled
        other = pace_of(check, replace(config, encoder=replace(config.encoder, execution=instead)))
        gain = other["pace"] / own["pace"]
        if gain > _FASTER:
            advice.append(f"encoder.execution={instead.name} is {gain:.2f} times as fast here, with equal results")
    if own["host"] > _HOST_BOUND:
        bound = f"the host launches for {own['host']:.0%} of a step, and the GPU waits for it"
        advice.append(f"{bound}: give each rank cores of its own, or a larger micro_batch_size, which changes the run ID")
    for line in advice:
        check.found.append(("warning", "change", line))
    if not advice:
        check.found.append(("ok", "change", "nothing: the host keeps ahead of the GPU"))


SHORT = (bandwidth, exact, pace)
WHOLE = (bandwidth, exact, repeats, runs, pace)


@contextlib.contextmanager
def _named(check: Check, what: str) -> Iterator[None]:
    """Make a finding of an error: the other parts still run."""
    try:
        yield
    except torch.OutOfMemoryError:
        check.found.append(("problem", what, "the GPU must hold the configured step; got out of memory: try a smaller micro_batch_size"))
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        check.found.append(("problem", what, f"this check must run to its end; got {said[-300:]}"))


def check_device(config: TrainConfig, seconds: float, device: torch.device) -> list[Finding]:
    """Return what a check of `device` finds in about `seconds`; with a minute or less, only the short parts."""
    check = Check(config, device, time.monotonic() + seconds)
    torch.set_num_threads(config.threads)
    for part in SHORT if seconds <= 60 else WHOLE:
        if time.monotonic() > check.deadline:
            check.found.append(("warning", part.__name__, f"not checked: the {seconds:.0f} s are over"))
            continue
        with _named(check, part.__name__):
            part(check)
    return check.found


def check_gpu(config: TrainConfig, seconds: float) -> list[Finding]:
    """Check the first GPU that torch sees; without one, say why not."""
    if not torch.cuda.is_available():
        why = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        return [("not run", "gpu", why)]
    return check_device(config, seconds, torch.device("cuda", 0))
