"""Small runs on images that break, and the command that scores them later."""

import sys
from collections.abc import Callable
from pathlib import Path

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import probe
from jobs.config import compose_job
from jobs.run import run_job
from tests.support import packing

CLASSES = ["ant", "bee", "cat"]
SMALL = [
    "data=imagefolder",
    "data.image_size=32",
    "data.holdout_fraction=0.25",
    "encoder.width=8",
    "epochs=2",
    "optimizer.warmup_epochs=1",
    "global_batch_size=16",
    "micro_batch_size=16",
    "probes.linear_paper_epochs=3",
    "log.tensorboard=false",
]
BAD = "val/bee/3.jpg"


def called(main: Callable[[], int], *words: object) -> tuple[int, str, str]:
    """Exit status and output of a command in this process."""
    done = packing.run(*words, main=lambda: _without_workers(main))
    return done.returncode, done.stdout, done.stderr


def _without_workers(main: Callable[[], int]) -> int:
    del sys.argv[-2:]  # --workers, which only the commands of packed sets have
    return main()


def score(*words: object) -> tuple[int, str, str]:
    return called(probe.main, *words)


def result_of(path: Path) -> RunResult:
    found = RunFolder(path).result()
    assert found is not None
    return found


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>"}[how])


def trained(path: Path, tree: Path, *overrides: str, breaks: str = "") -> RunResult:
    """A finished run; the image `breaks` is emptied once training has begun."""
    job = compose_job([*SMALL, f"data.root={tree}", f"run_dir={path}", *overrides])

    def begun() -> bool:
        if breaks:
            damage(tree / breaks, "empty")
        return False

    result = run_job(job, begun)
    assert result is not None
    assert result.status is RunStatus.completed
    return result


def weights(path: Path) -> dict[str, bytes]:
    return {k: v for k, v in left_behind(path).items() if k.endswith(".pt")}


def left_behind(path: Path) -> dict[str, bytes]:
    """All that training writes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in [path / "metrics.jsonl", *(path / "checkpoints").iterdir()]}
