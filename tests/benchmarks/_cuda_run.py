"""Runs that the parts of on_cuda.py start as a user does, by `python -m jobs.pretrain`, kill, and judge by their run folders."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Setup:
    """What the parts are run on; the defaults are a GPU's."""

    device: str = "cuda"
    gpus: int = 1
    cores: int = 16
    gpu_gb: float = 80.0
    encoders: list[str] = field(default_factory=lambda: ["resnet50", "resnet18", "resnet_small"])

    @property
    def rehearsal(self) -> bool:
        """Tiny, on the processor."""
        return self.device == "cpu"

    @property
    def ranks(self) -> int:
        """One a GPU."""
        return 2 if self.rehearsal else self.gpus

    @property
    def batch(self) -> int:
        """Images a step of the packed run."""
        return 8 if self.rehearsal else 128 if self.gpu_gb > 15 else 32

    @property
    def images(self) -> tuple[int, int]:
        """Training and validation images of the packed set."""
        return (64, 16) if self.rehearsal else (2048, 256)

    @property
    def epochs(self) -> int:
        """Return the steps of the packed run: 128 on most GPUs, enough to kill it halfway."""
        return 4 if self.rehearsal else 8

    @property
    def steps(self) -> int:
        """Of the packed run."""
        return self.images[0] // self.batch * self.epochs

    @property
    def workers(self) -> int:
        """Loader processes of the packed run, as many as cores and shared memory allow."""
        if self.rehearsal:
            return 0
        loaded = 2 * self.batch * 3 * 224 * 224  # bytes that each has ready at most
        shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        return max(0, min(self.cores - 1, 14, shared // (2 * loaded)))


class WrongError(Exception):
    """A part cannot go on; says why in one line."""


@dataclass
class Answer:
    """What a part found."""

    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # a line for each check that failed
    said: list[str] = field(default_factory=list)  # what a reader wants to know

    def require(self, holds: bool, otherwise: str) -> None:
        """A check."""
        if not holds:
            self.wrong.append(otherwise)


def pretrain_line(overrides: list[str], run_dir: Path, ranks: int = 0) -> list[str]:
    """The command of a run; under torchrun where a number of ranks is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "jobs.pretrain", *overrides, f"run_dir={run_dir}"]


@contextlib.contextmanager
def started(line: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, which does not outlive the block; what it says is added to `log`."""
    with open(log, "ab") as output:
        child = subprocess.Popen(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def completed(line: list[str], run_dir: Path) -> dict[str, Any]:
    """Run a command to its end: the run's result; WrongError, with what it said last, unless its status is 0 and the run has completed."""
    log = run_dir.with_suffix(".log")
    with started(line, log) as child:
        status = child.wait()
    lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
    if status:
        print("\n".join(lines[-10:]))
        raise WrongError(f"status {status} of {' '.join(line[1:])}: {lines[-1] if lines else 'no word'}")
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    if result["status"] != "completed" or result["missing"]:
        raise WrongError(f"the run is {result['status']}, without value: {result['missing'] or result['cause']}")
    return result


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The step records so far."""
    path = run_dir / "metrics.jsonl"
    found = []
    for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return [r for r in found if r["kind"] == "step"]


def settled(found: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """Pace and share of waiting of the second half of the steps, when kernels are loaded and what was loaded ahead is used up."""
    half = [r for r in found[len(found) // 2 :] if r["images_per_second"]]
    seconds = [batch / r["images_per_second"] for r in half]
    waited = sum(s * r["data_wait_share"] for s, r in zip(seconds, half, strict=True))
    return {"settled_images_per_second": batch * len(half) / sum(seconds), "settled_data_wait_share": waited / sum(seconds)}


def drawn(figures: dict[str, Any], nvml: str) -> str:
    """What the device reported of its energy and utilisation, for a reader."""
    joules, watts, busy = (figures[k] for k in ("joules_per_image", "watts", "gpu_utilisation"))
    said = [] if joules is None else [f"{joules:.3f} J an image", f"{watts:.0f} W"]
    said += [] if busy is None else [f"utilisation {busy:.0%}"]
    absent = f"{'the rest' if said else 'energy and utilisation'} not reported by NVML: {nvml}"
    return ", ".join([*said, *([absent] if nvml else [])])


def why_nvml_is_silent(setup: Setup) -> str:
    """Why energy or utilisation may be absent."""
    if setup.rehearsal:
        return "rehearsal on CPU"
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        return f"the driver's library cannot be loaded: {error}"
    return "the driver has no such counter for this device, such as a part of a MIG device, or a GPU before Volta"


def judge_run(answer: Answer, setup: Setup, result: dict[str, Any], run_dir: Path, batch: int, steps: int) -> None:
    """Figures that every run has, and the checks of its records."""
    found = records(run_dir)
    losses = [r["loss"] for r in found]
    answer.require([r["step"] for r in found] == list(range(1, steps + 1)), f"{len(found)} steps are recorded, and not 1 to {steps}")
    answer.require(all(x is not None and math.isfinite(x) for x in losses), "a loss is not finite")
    answer.require("linear.test_top1" in result["metrics"], "the linear probe has no test_top1")
    kwh, seconds = result["energy_kwh"], result["seconds"]
    joules = None if kwh is None else kwh * 3.6e6
    answer.figures |= {
        "steps": result["step"],
        "batch": batch,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": seconds,
        "images_per_second": result["images_per_second"],
        **settled(found, batch),
        "data_wait_share": result["data_wait_share"],
        "gpu_utilisation": result["gpu_utilisation"],
        "energy_kwh": kwh,
        "joules_per_image": None if joules is None else joules / (result["step"] * batch),
        "watts": None if joules is None else joules / seconds,
        "peak_memory_mb": result["peak_memory_mb"],
        "linear_top1": result["metrics"].get("linear.test_top1"),
        "nvml": "" if kwh is not None and result["gpu_utilisation"] is not None else why_nvml_is_silent(setup),
    }
    f = answer.figures
    pace, share = f["settled_images_per_second"], f["settled_data_wait_share"]
    fell = "" if None in (f["first_loss"], f["last_loss"]) else f", loss {f['first_loss']:.4f} to {f['last_loss']:.4f}"
    probed = f", linear probe {f['linear_top1']:.1f} %" if f["linear_top1"] is not None else ""
    answer.said += [
        f"{f['steps']} steps of {batch} images{fell}{probed}",
        f"settled {pace:,.0f} images/s, {share:.0%} of the time waiting for data; the whole run {f['images_per_second']:,.0f} images/s",
        f"peak {f['peak_memory_mb']:,.0f} MiB; with its probes {drawn(f, f['nvml'])}",
    ]


def kill_halfway(line: list[str], run_dir: Path, steps: int) -> tuple[int, int] | None:
    """Start a run and kill -9 it when it has made steps beyond a checkpoint of its second quarter or later: (that step, step recorded).

    None where it ended before. One that has made most of its steps and no such checkpoint is asked to stop, which saves it, and started
    again: a slow disk must not keep it from being killed.
    """
    from cnnjepa.run import checkpoint

    for asked_to_stop in (False, True):
        with started(line, run_dir.with_suffix(".log")) as child:
            while child.poll() is None:
                kept = max((c.step for c in checkpoint.find(run_dir / "checkpoints")), default=0)
                reached = len(records(run_dir))
                if kept >= steps / 4 and reached > kept:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    # Looked at again: it went on until it was dead, and what it had published by then is where it comes back to.
                    kept = max(c.step for c in checkpoint.find(run_dir / "checkpoints"))
                    return (kept, len(records(run_dir))) if kept < steps else None
                if not asked_to_stop and reached > 0.6 * steps:
                    child.send_signal(signal.SIGTERM)
                    child.wait()
                time.sleep(_POLL_SECONDS)
        if (run_dir / "result.json").exists():
            return None
    return None


def losses_apart(run: Path, other: Path) -> tuple[float, int]:
    """The largest relative difference of a step's loss, and at which step; infinite where the steps are not the same."""
    ours, theirs = records(run), records(other)
    if not theirs or [r["step"] for r in ours] != [r["step"] for r in theirs]:
        return math.inf, 0
    pairs = [(abs(a["loss"] - b["loss"]) / abs(b["loss"]), a["step"]) for a, b in zip(ours, theirs, strict=True)]
    return max(pairs)
