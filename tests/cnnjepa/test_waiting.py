"""The host reads numbers once a step and copies a checkpoint aside. No GPU is here: streams are recorded by a stand-in."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cnnjepa import train as loop
from cnnjepa.config import Precision
from cnnjepa.data.loader import Loaded
from cnnjepa.methods._base import build_method
from cnnjepa.models import tiles
from cnnjepa.probes import features
from cnnjepa.run import saver
from cnnjepa.run.copies import SideStream
from cnnjepa.run.ranks import Ranks
from tests.support.runs import run
from tests.support.tiny import tiny_config

# What copies a number from the device to the host, and so waits for it.
WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::item", "aten::unique2")


class Waits(TorchDispatchMode):
    """Names the ops for which a host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reads a tensor into a list, and where the step is meanwhile."""
    said: list[str] = []
    plain = Tensor.tolist

    def tolist(self: Tensor) -> Any:
        said.append(f"tolist of {self.numel()}")
        return plain(self)

    monkeypatch.setattr(Tensor, "tolist", tolist)
    return said


def test_within_forward_and_backward_the_host_waits_for_nothing_and_a_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    monkeypatch.setattr(tiles, "_kernels", lambda _: tiles.CUDA)  # a CPU's kernels count pairs of positions
    passes: list[list[str]] = []
    plain = loop.forward_backward

    def watched(*arguments: Any) -> Any:
        before = len(read)
        # Masks are host tensors, whose cells are counted before anything is queued.
        with Waits() as waits:
            out = plain(*arguments)
        passes.append([w for w in waits.seen if w != "aten::nonzero"] + read[before:])
        return out

    monkeypatch.setattr(loop, "forward_backward", watched)
    config = tiny_config(epochs=1)
    config.log.every_steps = 1000
    config.probes.names = []
    run(config, tmp_path)
    # In the first step the loader begins, which draws a number on the host.
    assert passes[1:] == [[]] * 4
    assert read == ["tolist of 6"] * 5, "loss, visible share, wishes and gradient norm, once a step"


def test_a_wait_would_be_seen() -> None:
    with Waits() as waits:
        (torch.ones(2).sum() * 2).item()
    assert waits.seen == ["aten::_local_scalar_dense"]


class RecordingStream:
    """Stands in for a CUDA stream."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: "RecordingStream") -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> "RecordingStream":
        self.said.append(f"event of {self.name}")
        return self

    def synchronize(self) -> None:
        self.said.append(f"the host waits for {self.name}")


class RecordingCuda:
    """Stands in for torch.cuda: what is asked of its streams, in order."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.main, self.side = RecordingStream("main", self.said), RecordingStream("side", self.said)

    def Stream(self) -> RecordingStream:
        return self.side

    def current_stream(self) -> RecordingStream:
        return self.main

    def is_available(self) -> bool:
        return False

    @contextlib.contextmanager
    def stream(self, stream: RecordingStream) -> Iterator[None]:
        self.said.append(f"copy on {stream.name}")
        yield


def test_a_checkpoint_is_copied_on_a_stream_of_its_own_and_only_the_writer_waits() -> None:
    cuda = RecordingCuda()
    side, x = SideStream(cuda), torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    copy = side.copy(x)
    side.copy(torch.ones(2))
    wait = side.close()
    assert cuda.said == ["side waits for main", "copy on side", "copy on side", "main waits for side", "event of side"]
    wait()
    assert cuda.said[-1] == "the host waits for side"
    assert copy.stride() == x.stride()
    x += 1
    assert copy.flatten()[0] == 0


def test_without_a_gpu_no_stream_is_made_and_the_copy_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = RecordingCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    state = {"a": [torch.ones(2)], "b": 3}
    copy, wait = saver.begun_copy(state)
    state["a"][0].zero_()  # type: ignore[index]
    wait()
    assert cuda.said == []
    assert copy["a"][0].tolist() == [1, 1]


def test_the_thread_that_writes_waits_for_the_copy_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(saver, "begun_copy", lambda state: (state, lambda: said.append("waited")))
    monkeypatch.setattr(saver.checkpoint, "save", lambda *_: said.append("saved"))
    one = saver.Saver(tmp_path, 60, 2)
    one.begin(1, {}, lambda: None)
    one.settle()
    assert said == ["waited", "saved"]


def test_features_are_bf16_on_a_gpu_where_the_run_is_and_fp32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp32 = tiny_config(precision=Precision.bf16), tiny_config()
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: asked.append((device, enabled)))
    for config in (bf16, fp32):
        for device in (cpu, cuda):
            features.in_bf16(config, device)
    assert asked == [("cpu", False), ("cuda", True), ("cpu", False), ("cuda", False)]


def test_features_in_bf16_are_pooled_in_fp32_from_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = tiny_config(), torch.device("cpu")
    encoder = build_method(config, 1, cpu).probe_encoder
    loaded: Loaded = [torch.randint(0, 255, (4, 1, 32, 32), dtype=torch.uint8)], torch.zeros(4)
    monkeypatch.setattr(features, "probe_loader", lambda *_: iter(loaded[0]))
    monkeypatch.setattr(features, "normalise", lambda pixels, *_: pixels.expand(4, 3, 32, 32).float() / 255)
    exact = features.pooled_features(encoder, config, None, None, np.arange(4), Ranks(0, 1, cpu))  # type: ignore[arg-type]
    monkeypatch.setattr(features, "in_bf16", lambda config, device: torch.autocast("cpu", torch.bfloat16))
    rounded = features.pooled_features(encoder, config, None, None, np.arange(4), Ranks(0, 1, cpu))  # type: ignore[arg-type]
    assert rounded.dtype is exact.dtype is torch.float32
    assert 0 < (rounded - exact).abs().max() / exact.abs().max() < 0.05
