"""Runs of the trainer, and what two of them are compared by."""

from collections.abc import Sequence
from pathlib import Path

import torch

from cnnjepa.config import TrainConfig
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import TIMING_KEYS, RunFolder, RunResult
from cnnjepa.train import train
from tests.support.forked import Forked
from tests.support.held import wait_until

# HOLD_AT: when a checkpoint of that step or a later one has been added, the last rank says so and waits to be killed. Until then it is
# slowed, so that the newest checkpoint is of the step before; the slowness changes nothing that is computed.
CHILD = """
import json, os, sys, time, torch
from pathlib import Path
from cnnjepa.run import checkpoint
from cnnjepa.run.identity import from_dict
from cnnjepa.run.folder import RunFolder
from cnnjepa.train import train
folder = RunFolder(Path(sys.argv[1]))
config = from_dict(json.loads(sys.argv[2]))
hold_at = int(os.environ.get("HOLD_AT", "0"))
def newest():
    return max((c.step for c in checkpoint.find(folder.checkpoints)), default=0)
before = newest()
def slow():
    if hold_at:
        time.sleep(0.15)
        if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) and newest() >= max(hold_at, before + 1):
            Path(f"{folder.path}.held").touch()
            time.sleep(3600)
    return False
folder.prepare(config)
train(config, folder, slow)
"""


def wait_until_held(path: Path, children: Sequence[Forked]) -> None:
    """Until the child of the run folder `path` waits to be killed."""
    held = Path(f"{path}.held")
    wait_until("checkpoint at which it is held", held.exists, lambda: all(c.poll() is None for c in children))
    held.unlink()


def run(config: TrainConfig, path: Path, **more: object) -> RunResult | None:
    folder = RunFolder(path)
    folder.prepare(config)
    return train(config, folder, **more)  # type: ignore[arg-type]


def comparable(path: Path) -> tuple[list[dict], dict]:
    folder = RunFolder(path)
    result = folder.result()
    assert result is not None
    records = [{k: v for k, v in r.items() if k not in TIMING_KEYS} for r in folder.metrics()]
    return records, {k: v for k, v in result.to_dict().items() if k not in TIMING_KEYS}


def final_state(path: Path) -> dict:
    newest = checkpoint.newest_good(path / "checkpoints")
    assert newest is not None
    return checkpoint.read(newest, torch.device("cpu"))


def assert_bitwise_equal(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in TIMING_KEYS:
                assert_bitwise_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert isinstance(b, list)
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bitwise_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where
