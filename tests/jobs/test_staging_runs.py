"""Runs that train on a staged set: one copy for all ranks, and the set itself where it cannot be staged."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.config import compose_job
from jobs.run import run_job
from jobs.staging import own_folder
from tests.jobs.test_pretrain import SMALL, TORCHRUN, pretrain
from tests.support.images import image_tree, write_idx
from tests.support.packing import run as pack
from tests.support.runs import comparable
from tests.support.staging import BYTES, assert_same_files, child, copied_bytes, end, set_of, write_manifest


def fashion(folder: Path) -> Path:
    """Images enough for SMALL, with a manifest."""
    random = np.random.default_rng(0)
    for part, count in (("train", 160), ("t10k", 60)):
        labels = np.arange(count) % 10
        pixels = random.integers(0, 128, (count, 28, 28)) + 12 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, packed=False)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, packed=False)
    return write_manifest(folder)


@pytest.mark.slow
def test_a_run_copies_once_for_its_ranks_and_reads_the_copy(tmp_path: Path, scratch: Path) -> None:
    source = fashion(tmp_path / "fashion")
    arguments = [*SMALL, "epochs=1", "data=fashion_mnist", "data.train_limit=160", f"data.root={source}"]
    staged = pretrain([*arguments, f"local_scratch={scratch}", f"run_dir={tmp_path / 'staged'}"], TORCHRUN)
    assert staged.returncode == 0, staged.stderr
    assert copied_bytes(staged.stdout) == [set_of(source).bytes]

    def end_of(name: str, *more: str) -> object:
        run_job(compose_job([*arguments, *more, f"run_dir={tmp_path / name}"]))
        return comparable(tmp_path / name)

    undisturbed = end_of("plain")
    assert end_of("again", f"local_scratch={scratch}") == undisturbed
    # What lies on the node is what is read: the same set in black gives another run.
    pixels = own_folder(str(scratch)) / set_of(source).key / "train-images-idx3-ubyte"
    pixels.write_bytes(pixels.read_bytes()[:16] + bytes(160 * 28 * 28))
    assert end_of("black", f"local_scratch={scratch}") != undisturbed


def test_a_set_as_it_was_packed_is_staged_and_trains_as_the_loose_images_do(
    tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=90)
    assert pack(tree, tmp_path / "packed", "--images-per-file", 50).returncode == 0
    arguments = [*SMALL, "epochs=1", "data=imagefolder", "data.image_size=32"]
    for name, more in (("tree", []), ("packed", [f"local_scratch={scratch}"])):
        run_job(compose_job([*arguments, f"data.root={tmp_path / name}", *more, f"run_dir={tmp_path / 'runs' / name}"]))
    assert comparable(tmp_path / "runs" / "packed") == comparable(tmp_path / "runs" / "tree")
    assert copied_bytes(capsys.readouterr().out) == [set_of(tmp_path / "packed").bytes]
    assert_same_files(tmp_path / "packed", own_folder(str(scratch)) / set_of(tmp_path / "packed").key)


@pytest.mark.slow
def test_a_run_that_cannot_stage_says_so_once_and_reads_the_set_itself(
    tmp_path: Path, scratch: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    source = fashion(tmp_path / "fashion")
    arguments = [*SMALL, "epochs=1", "data=fashion_mnist", "data.train_limit=160", f"data.root={source}"]
    ended = run_job(compose_job([*arguments, "local_scratch=/sys", f"run_dir={tmp_path / 'a'}"]))
    assert ended is not None
    assert ended.metrics
    (warned,) = [r.getMessage() for r in caplog.records if "staged" in r.getMessage()]
    assert warned.startswith(f"not staged, the run reads {source}: [Errno ")
    assert "\n" not in warned
    (source / "manifest.json").unlink()
    run_job(compose_job([*arguments, f"local_scratch={scratch}", f"run_dir={tmp_path / 'b'}"]))
    assert f"not staged: {source} holds loose files and no packed set\n" in capsys.readouterr().out
    assert not list(scratch.iterdir())
    # A run that has ended is not worth a copy.
    write_manifest(source)
    run_job(compose_job([*arguments, f"local_scratch={scratch}", f"run_dir={tmp_path / 'b'}"]))
    assert not list(scratch.iterdir())


@pytest.mark.slow
def test_a_run_asked_to_stop_while_another_process_copies_stops(tmp_path: Path, scratch: Path) -> None:
    source = fashion(tmp_path / "fashion")
    for name in ("file-0", "file-1"):
        (source / name).write_bytes(bytes(BYTES))
    write_manifest(source)
    copier = child(source, scratch, until=1)
    assert copier.stdout is not None
    copier.stdout.readline()
    copier.stdout.readline()
    arguments = [*SMALL, "epochs=1", "data=fashion_mnist", "data.train_limit=160", f"data.root={source}", f"local_scratch={scratch}"]
    line = [sys.executable, "-u", "-m", "jobs.pretrain", *arguments, f"run_dir={tmp_path / 'run'}"]
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert "waiting for the process that copies" in run.stdout.readline()
    run.terminate()
    out, err = run.communicate(timeout=30)
    assert run.returncode == 130, err
    assert "the same command resumes it" in out
    end(copier)
    again = pretrain([*arguments, f"run_dir={tmp_path / 'run'}"])
    assert again.returncode == 0, again.stderr
    assert len(copied_bytes(again.stdout)) == 1
