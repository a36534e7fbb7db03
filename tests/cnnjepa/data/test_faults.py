"""What stops the loading of images ends every rank by its own cause: a damaged image, a full /dev/shm, a disk that may answer again."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cnnjepa.data import faults, loader, opened, pack, sources
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.packed import PackedImages
from cnnjepa.run.folder import HopelessError, RunStatus
from cnnjepa.run.ranks import Ranks
from jobs.config import compose_job
from jobs.run import run_job
from sweeps.report.status import sweep_status
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.cnnjepa.test_distributed import Launched
from tests.support import packing
from tests.support.images import image_tree
from tests.support.scored import CLASSES, SMALL, damage, result_of

ALONE = Ranks(0, 1, torch.device("cpu"))
NO_SPACE = "unable to write to file </torch_17_42_0>: No space left on device (28)"
# A run whose files on rank RANK answer with an error of the system, and a run without room in /dev/shm: both fakes.
UNANSWERED = """
import errno, os, sys
from pathlib import Path
whole = Path.read_bytes
def read(self):
    if os.environ["RANK"] == "1" and self.suffix == ".jpg":
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return whole(self)
Path.read_bytes = read
from jobs import pretrain
sys.exit(pretrain.main())
"""
FULL = f"""
import os, sys
from cnnjepa.data import loader
def fail(views):
    raise RuntimeError("{NO_SPACE}")
if os.environ["RANK"] == "1":
    loader._batch = fail
from jobs import pretrain
sys.exit(pretrain.main())
"""
# A worker of two ranks, as srun starts it.
WORKER = """
import os, sys
from pathlib import Path
from cnnjepa.run.ranks import Device, joined
from jobs.config import compose_job
from sweeps.execution.worker_ranks import WorkerOnRanks
from sweeps.state.folder import Sweep
from sweeps.state.view import View
with joined(Device.cpu) as ranks:
    cluster = compose_job(["cluster=local"]).cluster
    os._exit(WorkerOnRanks(View(Sweep.load(Path(sys.argv[1]))), cluster, ranks, lambda: False, "driver").run())
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", CLASSES, images=16)


def damaged_pack(tree: Path, folder: Path, split: str, number: int) -> Path:
    """A packed set in which the head of one image was overwritten after packing."""
    assert packing.run(tree, folder).returncode == 0
    dataset = load_splits(compose_job([*SMALL, f"data.root={folder}"]).train.data).dataset
    images = dataset.train if split == "train" else dataset.test
    assert isinstance(images, PackedImages)
    with open(images.paths[0], "r+b") as file:
        file.seek(int(images._start[number]))
        file.write(bytes(40))
    return folder


def on_two_ranks(run: Path, *words: str, start: tuple[str, ...] = ("-m", "jobs.pretrain")) -> tuple[list[int], list[str]]:
    """Exit statuses and what the ranks wrote to standard error."""
    out = [run.with_suffix(f".{rank}.txt") for rank in range(2)]
    asked = [*SMALL, "micro_batch_size=8", f"run_dir={run}", *words]
    children = Launched(2, ["-c", TO_FILE, str(run), json.dumps([*start, *asked])])
    try:
        return [child.wait(timeout=120) for child in children], [path.read_text() for path in out]
    finally:
        for child in children:
            child.kill()


# Each rank's output goes to a file of its own.
TO_FILE = """
import json, os, runpy, sys
file = os.open(sys.argv[1] + "." + os.environ["RANK"] + ".txt", os.O_WRONLY | os.O_CREAT)
os.dup2(file, 1), os.dup2(file, 2)
kind, what, *sys.argv[1:] = json.loads(sys.argv[2])
if kind == "-c":
    exec(compile(what, "<string>", "exec"))
else:
    sys.modules.pop(what, None)
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"),
    [("loose", 2), *(pytest.param(k, w, marks=pytest.mark.nightly) for k, w in (("loose", 0), ("packed", 0), ("packed", 2)))],
)
def test_a_damaged_image_ends_both_ranks_by_its_own_cause(kind: str, workers: int, tree: Path, tmp_path: Path) -> None:
    root, named = tree, f"{tree / 'train/bee/9.jpg'}: "
    if kind == "loose":
        damage(tree / "train/bee/9.jpg", "truncated")
    else:
        root = damaged_pack(tree, tmp_path / "packed", "train", 25)
        named = f"{root / 'train-00000.arrow'}, image 25: "
    run = tmp_path / "run"
    statuses, said = on_two_ranks(run, f"data.root={root}", f"data.workers={workers}", "probes.names=[]")
    result = result_of(run)
    assert statuses == [1, 1]
    assert result.status is RunStatus.failed
    assert result.cause.startswith(f"DamagedImagesError: {named}"), result.cause
    assert result.cause.endswith("data.on_bad_image=skip leave it out")
    assert f"cause: {result.cause}" in said[0]
    assert "closed by peer" not in "".join(said)


def test_a_worker_of_two_ranks_records_the_cause_and_goes_on(tree: Path, tmp_path: Path) -> None:
    damage(tree / "train/cat/2.jpg", "empty")
    scale = Scale([*SMALL, "micro_batch_size=8", "probes.names=[]", f"data.root={tree}"], seeds=1)
    spec = SweepSpec("damaged", "Who ends?", configurations=[Configuration({"method.predictor.depth": 1})], smoke=scale, paper=scale)
    sweep = Sweep.of(spec, ScaleName.smoke, build_trials(spec, scale, 1, "local", []), tmp_path / "damaged-smoke")
    sweep.write()
    children = Launched(2, ["-c", WORKER, str(sweep.path)])
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    (trial,) = sweep_status(View(sweep))["trials"]
    assert trial["state"] == "failed"
    assert trial["cause"].startswith(f"DamagedImagesError: {tree / 'train/cat/2.jpg'}: no image in its 0 bytes")


@pytest.mark.parametrize("kind", [pytest.param("loose", marks=pytest.mark.nightly), "packed"])
def test_a_damaged_probe_image_ends_both_ranks_before_training(kind: str, tree: Path, tmp_path: Path) -> None:
    root, named = tree, str(tree / "val/cat/3.jpg")
    if kind == "loose":
        damage(tree / "val/cat/3.jpg", "text")
    else:
        root = damaged_pack(tree, tmp_path / "packed", "val", 35)
        named = f"{root / 'val-00000.arrow'}, image 35"
    statuses, _ = on_two_ranks(tmp_path / "run", f"data.root={root}")
    result = result_of(tmp_path / "run")
    assert (statuses, result.status, result.step) == ([1, 1], RunStatus.failed, 0)
    assert result.cause.startswith(f"DamagedImagesError: data.root must hold images that can be decoded; got {named}: no image in its ")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_what_a_retry_may_read_is_not_recorded_on_several_ranks(workers: int, tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"data.root={tree}", f"data.workers={workers}", "probes.names=[]")
    statuses, said = on_two_ranks(run, *words, start=("-c", UNANSWERED))
    assert statuses == [1, 1]
    assert not (run / "result.json").exists()
    for rank in said:
        (line,) = [line for line in rank.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: training ended by an error at step 0: LoadingError: OSError: [Errno 116] Stale file handle: '")
        assert f"{tree}/train/" in line


@pytest.mark.nightly
def test_a_full_shared_memory_of_one_rank_is_recorded(tree: Path, tmp_path: Path) -> None:
    words = (f"data.root={tree}", "data.workers=2", "probes.names=[]")
    statuses, _ = on_two_ranks(tmp_path / "run", *words, start=("-c", FULL))
    assert statuses == [1, 1]
    assert result_of(tmp_path / "run").cause.startswith("SharedMemoryError: /dev/shm")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_system_names_the_file(workers: int, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, whole = tree / "train/ant/3.jpg", Path.read_bytes

    def read(self: Path) -> bytes:
        if self == bad:
            raise OSError(errno.EIO, "Input/output error")  # as `read` raises it, without a name
        return whole(self)

    monkeypatch.setattr(Path, "read_bytes", read)
    words = [*SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}", f"data.workers={workers}", "probes.names=[]"]
    result = run_job(compose_job(words))
    assert result is not None
    assert result.cause == f"OSError: [Errno 5] Input/output error: '{bad}'"
    with pytest.raises(OSError, match=r"Input/output error: '.*ant/3\.jpg'"):
        opened.require_decodable(load_splits(compose_job(words).train.data), "data.root")


def test_packing_leaves_out_no_image_that_the_disk_refuses_for_now(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sources.read

    def read(entry: sources.Entry) -> tuple[bytes, int]:
        if entry.name == "bee/4.jpg":
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return whole(entry)

    monkeypatch.setattr(sources, "read", read)
    monkeypatch.setattr("sys.argv", ["pack", str(tree), str(tmp_path / "packed"), "--workers", "1", "--skip-corrupt"])
    assert pack.main() == 1
    bad = tree / "train/bee/4.jpg"
    assert (
        f"error: [Errno 110] Connection timed out: '{bad} (train/bee/4.jpg)': run the same command again to continue"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sources, "read", whole)
    assert pack.main() == 0
    assert json.loads((tmp_path / "packed" / "manifest.json").read_text())["skipped"] == {"train": [], "val": []}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ECONNRESET])
def test_errors_that_may_pass(number: int) -> None:
    assert faults.may_pass(OSError(number, os.strerror(number), "file"))


@pytest.mark.parametrize(
    "error", [OSError("image file is truncated"), PermissionError(errno.EACCES, "no"), FileNotFoundError(errno.ENOENT, "no")]
)
def test_errors_that_stay(error: Exception) -> None:
    assert not faults.may_pass(error)


def test_a_file_that_is_gone_is_named_once(tree: Path) -> None:
    splits = load_splits(compose_job([*SMALL, f"data.root={tree}"]).train.data)
    (tree / "train/ant/0.jpg").unlink()
    (found,) = opened.damaged(splits.dataset.train, [0, 1])
    assert found.line == f"{tree / 'train/ant/0.jpg'}: No such file or directory"


class _Worker(Dataset[int]):
    """A fake of torch's own ends: `act` is done in the loader process."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.act()
        return index


def _no_space() -> None:
    raise RuntimeError(NO_SPACE)


def _bus_error() -> None:
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.parametrize(
    ("act", "got"),
    # torch looks every 5 seconds whether a process has ended
    [(_no_space, NO_SPACE), pytest.param(_bus_error, "a loader process that a bus error ended", marks=pytest.mark.nightly)],
)
def test_a_full_shared_memory_is_named_with_what_to_do(act: Callable[[], None], got: str) -> None:
    with pytest.raises(faults.SharedMemoryError) as raised:
        list(loader.surviving(lambda _done: DataLoader(_Worker(act), num_workers=2)))
    said = str(raised.value)
    assert said.startswith("/dev/shm of ")
    assert f" MiB must have room for the batches of all loader processes; got {got}: use fewer data.workers, now 2, or enlarge" in said
    assert "\n" not in said
    assert multiprocessing.active_children() == [], "they end before the error is dealt with"


def test_other_ends_of_a_loader_say_nothing_of_shared_memory() -> None:
    for error in (RuntimeError("CUDA out of memory"), OSError(errno.ENOSPC, "No space left on device", "/scratch/run/x")):
        assert faults.shared_memory(error, 2, bus_error=False) is None


def test_a_full_shared_memory_is_the_cause_of_the_run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_views: Any) -> Any:
        raise RuntimeError(NO_SPACE)

    monkeypatch.setattr(loader, "_batch", fail)
    result = run_job(compose_job([*SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}", "data.workers=1", "probes.names=[]"]))
    assert result is not None
    assert result.cause.startswith("SharedMemoryError: /dev/shm of ")
    assert NO_SPACE in result_of(tmp_path / "run").cause


def test_all_ranks_raise_the_error_that_no_retry_helps_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_if(*others: Exception | None) -> None:
        monkeypatch.setattr(faults, "gathered", lambda mine, _ranks: [mine, *others])

    ranks = Ranks(0, 3, torch.device("cpu"))
    as_if(None, None)
    faults.raise_alike(None, ranks)
    as_if(OSError("a"), faults.DamagedImagesError("b"))
    with pytest.raises(HopelessError, match="b"):
        faults.raise_alike(OSError("c"), ranks)
    as_if(faults.LoadingError("OSError: a"), None)
    with pytest.raises(faults.LoadingError, match="OSError: a"):
        faults.raise_alike(None, ranks)
