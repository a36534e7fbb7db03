"""Errors in training name the image that cannot be decoded and its cause, in this process and in loader processes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnjepa.data import pack
from cnnjepa.data_config import DatasetName
from cnnjepa.run.folder import RunError
from tests.support.runs import run
from tests.support.tiny import tiny_config

BAD = Path("train", "bee", "07.png")
_RANDOM = np.random.default_rng(0)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for split, count in (("train", 16), ("val", 4)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = _RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:02}.png")
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def deep(path: Path) -> None:
    Image.fromarray(np.ones((40, 40), dtype=np.float32)).save(path, "TIFF")


DAMAGES = [(cut, "truncated"), (empty, "no image in its 0 bytes"), (deep, "its pixels are 32-bit floating-point numbers")]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("damage", "cause"), DAMAGES, ids=["cut short", "empty", "of no known range"])
def test_the_cause_names_the_file(damage: object, cause: str, workers: int, tree: Path, tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    config.data.name, config.data.root, config.data.workers = DatasetName.imagefolder, str(tree), workers
    config.data.train_limit = config.data.test_limit = 0
    config.data.holdout_fraction = 0.2
    config.global_batch_size = config.micro_batch_size = 8
    config.probes.names = []  # which would look first
    damage(tree / BAD)  # type: ignore[operator]
    with pytest.raises(RunError) as raised:
        run(config, tmp_path / "run")
    said = str(raised.value.__cause__)
    assert said.startswith(f"{tree / BAD}: "), said
    assert cause in said
    assert "\n" not in said


def test_packing_names_it_too(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    deep(tree / BAD)
    monkeypatch.setattr("sys.argv", ["pack", str(tree), str(tmp_path / "packed"), "--workers", "1"])
    assert pack.main() == 1
    assert "corrupt: train/bee/07.png: its pixels are 32-bit floating-point numbers" in capsys.readouterr().err
