"""The parts of on_cuda.py, each run as `python _cuda_parts.py NAME FOLDER SETUP ANSWER`, which writes what it found to ANSWER.

SETUP is the JSON of a Setup. Runs are started as a user starts them, by `python -m jobs.pretrain`, and judged by their run folders.
"""

import contextlib
import functools
import io
import json
import math
import multiprocessing
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

import numpy as np

# What needs torch imports it where it is used: a part that only starts runs does not pay for it.
ROOT = Path(__file__).resolve().parents[2]
RANKS_TOLERANCE = 1e-9  # of losses in float64, R ranks against one
CLASSES = 4
WARM_STEPS, MEASURED_SECONDS = 20, 5.0
_POLL_SECONDS, _TRIES = 0.005, 3


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


# The parts. Each gets the folder that all share, and the setup.


def digits(folder: Path, setup: Setup) -> Answer:
    """A run on digits from its start to its probes."""
    batch, epochs = (32, 1) if setup.rehearsal else (128, 5)
    images = 160 if setup.rehearsal else 1437
    small = (
        [f"data.train_limit={images}", "data.test_limit=60", "encoder.width=8", "probes.linear_paper_epochs=2"] if setup.rehearsal else []
    )
    overrides = ["data=digits", f"device={setup.device}", f"epochs={epochs}", f"global_batch_size={batch}", f"micro_batch_size={batch}"]
    overrides += ["precision=bf16", "optimizer.warmup_epochs=0.5", "optimizer.lr=0.002", "log.every_steps=1", *small]
    answer, run_dir = Answer(), folder / "digits"
    result = completed(pretrain_line(overrides, run_dir), run_dir)
    judge_run(answer, setup, result, run_dir, batch, images // batch * epochs)
    return answer


def picture(number: int, label: int, height: int, width: int) -> bytes:
    """A JPEG: stripes whose direction tells the class, random colours and places, with grain."""
    from PIL import Image

    random = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = math.pi * label / CLASSES
    waves = np.sin((np.cos(angle) * x + np.sin(angle) * y) * random.uniform(20, 60) / width + random.uniform(0, 6))
    pixels = random.uniform(60, 190, 3) + waves[..., None] * random.uniform(-50, 50, 3) + random.normal(0, 15, (height, width, 3))
    for _ in range(6):  # things to tell places by
        top, left = random.integers(height), random.integers(width)
        pixels[top : top + height // 4, left : left + width // 4] = random.uniform(0, 255, 3)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_picture(task: tuple[str, int, int], height: int, width: int) -> None:
    path, number, label = task
    Path(path).write_bytes(picture(number, label, height, width))


def packed_set(folder: Path, setup: Setup) -> Answer:
    """A synthetic set of ImageNet's shape, packed by the project's own packer."""
    height, width = (36, 48) if setup.rehearsal else (375, 500)
    began, tasks = time.perf_counter(), []
    for split, count in zip(("train", "val"), setup.images, strict=True):
        for i in range(count):
            path = folder / "tree" / split / f"class{i % CLASSES}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            tasks.append((str(path), 2 * i + (split == "val"), i % CLASSES))
    write = functools.partial(_write_picture, height=height, width=width)
    if setup.rehearsal:
        for task in tasks:
            write(task)
    else:
        with multiprocessing.get_context("fork").Pool(setup.cores) as pool:
            pool.map(write, tasks, chunksize=16)
    made, answer = time.perf_counter() - began, Answer()
    per_file = setup.images[0] // (1 if setup.rehearsal else min(setup.cores, 16))
    workers = 1 if setup.rehearsal else setup.cores
    line = [sys.executable, "-m", "cnnjepa.data.pack", str(folder / "tree"), str(folder / "packed")]
    line += ["--images-per-file", str(per_file), "--workers", str(workers)]
    began = time.perf_counter()
    done = subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongError(f"status {done.returncode} of packing: {done.stderr.strip().splitlines()[-1:]}")
    seconds, size = time.perf_counter() - began, sum(p.stat().st_size for p in (folder / "packed").iterdir())
    size_of_one = size / len(tasks)
    answer.figures = {"images": len(tasks), "bytes_per_image": size_of_one, "seconds": seconds, "making_seconds": made}
    shown = f"{len(tasks):,} images of {width} x {height} made in {made:.1f} s, packed in {seconds:.1f} s"
    answer.said = [f"{shown}, {size_of_one / 1e3:.0f} kB each"]
    return answer


def packed_overrides(folder: Path, setup: Setup) -> list[str]:
    """The run on the packed set: a ResNet-50 at 224 pixels in bf16, or a small one."""
    size, encoder = (32, "resnet_small") if setup.rehearsal else (224, "resnet50")
    overrides = [f"data.root={folder / 'packed'}", f"data.image_size={size}", f"data.workers={setup.workers}", f"encoder.name={encoder}"]
    overrides += [f"epochs={setup.epochs}", f"global_batch_size={setup.batch}", f"micro_batch_size={setup.batch}", "precision=bf16"]
    overrides += ["optimizer.lr=0.001", "optimizer.warmup_epochs=1", "log.every_steps=1", f"device={setup.device}"]
    # Statistics for TensorBoard at every step would be measured too. A few steps make no features worth a judgement.
    overrides += ["log.tensorboard=false", "probes.collapsed_std=0", "probes.collapsed_rankme=0"]
    small = ["encoder.width=8", "probes.linear_paper_epochs=2", "probes.knn_k=5"] if setup.rehearsal else []
    return ["data=imagefolder", *overrides, *small]


def packed(folder: Path, setup: Setup) -> Answer:
    """A run on the packed set, left alone."""
    answer, run_dir = Answer(), folder / "undisturbed"
    result = completed(pretrain_line(packed_overrides(folder, setup), run_dir), run_dir)
    judge_run(answer, setup, result, run_dir, setup.batch, setup.steps)
    answer.figures["loader_processes"] = setup.workers
    return answer


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


def resumed(folder: Path, setup: Setup) -> Answer:
    """Kill the same run halfway, resume it with the same command and compare it with the undisturbed run."""
    # Saving changes nothing that is computed; a save at every chance gives the kill a checkpoint to come back to.
    overrides = [*packed_overrides(folder, setup), "checkpoint.every_minutes=0"]
    for attempt in range(_TRIES):
        run_dir = folder / f"killed{attempt}"
        line = pretrain_line(overrides, run_dir)
        kill = kill_halfway(line, run_dir, setup.steps)
        if kill is not None:
            break
    else:
        raise WrongError(f"the run ended {_TRIES} times before it could be killed beyond a checkpoint")
    resumed_at, killed_at = kill
    result = completed(line, run_dir)
    from _same_run import hold_against, verdict

    answer, found = Answer(), hold_against(run_dir, folder / "undisturbed")
    answer.wrong, said = verdict(found, resumed_at)
    answer.require(result["resumes"] >= 1, "the run has not been resumed: it began again")
    answer.figures = {"killed_at": killed_at, "resumed_at": resumed_at, "resumes": result["resumes"], **found}
    answer.said = [f"killed -9 at step {killed_at} of {setup.steps}, resumed at step {resumed_at}", said]
    return answer


def losses_apart(run: Path, other: Path) -> tuple[float, int]:
    """The largest relative difference of a step's loss, and at which step; infinite where the steps are not the same."""
    ours, theirs = records(run), records(other)
    if not theirs or [r["step"] for r in ours] != [r["step"] for r in theirs]:
        return math.inf, 0
    pairs = [(abs(a["loss"] - b["loss"]) / abs(b["loss"]), a["step"]) for a, b in zip(ours, theirs, strict=True)]
    return max(pairs)


def bucket_apart(device: str) -> float:
    """How far gradients that went through GradientBuckets and a group of one rank are from half of those that did not.

    Half, since the buckets are given two ranks: of one they send nothing. It is what a single GPU can tell of NCCL: messages that leave
    within the backward pass must wait for the gradients they carry.
    """
    import copy

    import torch
    import torch.distributed as dist
    from torch import nn

    from cnnjepa.distributed import GradientBuckets
    from cnnjepa.run.ranks import Ranks

    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", 0)
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        wide = 1024 if device == "cuda" else 16
        plain = nn.Sequential(*(nn.Linear(wide, wide) for _ in range(6))).double().to(place)
        through = copy.deepcopy(plain)
        x = torch.randn(64, wide, dtype=torch.float64).to(place)
        parameters = list(through.parameters())
        buckets = GradientBuckets(parameters, Ranks(0, 2, place), megabytes=wide * wide * 12 / 2**20)
        worst = 0.0
        for _ in range(5):
            for net in (plain, through):
                net.zero_grad()
            plain(x).square().mean().backward()
            buckets.arm()
            through(x).square().mean().backward()
            mean = buckets.finish(torch.ones(1, dtype=torch.float64, device=place))
            worst = max(worst, abs(mean.item() - 0.5))
            for p, q in zip(parameters, plain.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                worst = max(worst, ((p.grad - q.grad / 2).abs().max() / q.grad.abs().max()).item())
        return worst if math.isfinite(worst) else math.inf
    finally:
        dist.destroy_process_group()


def ranks(folder: Path, setup: Setup) -> Answer:
    """As many ranks as GPUs under torchrun against one rank, in float64 on digits."""
    count = setup.ranks
    images, batch = (64, 32 * count) if setup.rehearsal else (1280, 32 * count)
    batch = min(batch, images)
    overrides = ["data=digits", f"device={setup.device}", "precision=fp64", f"global_batch_size={batch}", "micro_batch_size=16"]
    overrides += ["epochs=2", f"data.train_limit={images}", "data.test_limit=60", "encoder.width=8", "log.every_steps=1"]
    overrides += [
        "optimizer.warmup_epochs=0.5",
        "optimizer.lr=0.002",
        "log.tensorboard=false",
        "probes.linear_paper_epochs=2",
        "probes.names=[linear]",
    ]
    runs = [folder / "ranks_many", folder / "ranks_one"]
    for run_dir, number in zip(runs, (count, 0), strict=True):
        completed(pretrain_line(overrides, run_dir, number), run_dir)
    answer, (apart, step) = Answer(), losses_apart(*runs)
    backend = "gloo" if setup.rehearsal else "nccl"
    bucket = bucket_apart(setup.device)
    answer.figures = {"ranks": count, "backend": backend, "loss_apart": apart, "at_step": step, "group_of_one_apart": bucket}
    answer.require(apart <= RANKS_TOLERANCE, f"losses of {count} ranks and of one are {apart:.1e} apart at step {step}")
    answer.require(bucket <= RANKS_TOLERANCE, f"gradients through a {backend} group of one are {bucket:.1e} apart")
    answer.said = [
        f"{count} under torchrun against 1 without: losses at most {apart:.1e} apart in float64",
        *([] if count > 1 else ["one GPU, one rank: the trainer joins no group, so that NCCL itself is seen below alone"]),
        f"gradient buckets through a {backend} group of one rank: {bucket:.1e} apart",
    ]
    return answer


def execution(folder: Path, setup: Setup) -> Answer:
    """Tiled against masked execution in float64."""
    import torch
    from _execution import TOLERANCE
    from _execution import execution as measure

    found, answer = measure(setup.encoders, torch.device(setup.device)), Answer()
    answer.figures, worst = found, found["worst_apart"]
    answer.require(worst <= TOLERANCE, f"tiled and masked execution are {worst:.1e} apart, more than {TOLERANCE}")
    repeats = max(r["run again"] for r in found["rows"] if "run again" in r)
    goes_on = max(r["resumed"] for r in found["rows"] if "resumed" in r)
    answer.said = [f"at most {worst:.1e} apart; 6 bf16 steps again {repeats:.1e}, restored after 3 {goes_on:.1e}"]
    return answer


def measure_steps(bench: Any, seconds: float) -> dict[str, Any]:
    """Steps of our way for so many seconds, on images that are on the device."""
    import torch

    from cnnjepa.monitoring.gpu import nvml_joules, nvml_utilisation

    cuda = bench.device.type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else bench.device
    warm = WARM_STEPS if cuda else 1
    for step in range(warm):
        bench.ours("tiled", step)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    read, look = nvml_joules(device), nvml_utilisation(device)
    before, began, steps, busy = read() if read else 0.0, time.perf_counter(), 0, []
    while time.perf_counter() - began < seconds or not steps:
        bench.ours("tiled", warm + steps)
        steps += 1
        if look and steps % 5 == 0:
            busy.append(look())
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    joules = read() - before if read else None
    return {
        "steps": steps,
        "images_per_second": bench.batch * steps / took,
        "ms_per_step": took / steps * 1e3,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
        "reserved_mb": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
        "joules_per_image": None if joules is None else joules / (bench.batch * steps),
        "watts": None if joules is None else joules / took,
        "gpu_utilisation": sum(busy) / len(busy) if busy else None,
    }


def step(folder: Path, setup: Setup) -> Answer:
    """The step alone, without data: pace, memory, energy and utilisation."""
    import argparse

    import torch
    from step import Bench

    encoder, size = ("resnet_small", 32) if setup.rehearsal else ("resnet50", 224)
    asked = argparse.Namespace(size=size, encoder=encoder, compile=False)
    answer, rows, nvml = Answer(), [], ""
    for batch in [4] if setup.rehearsal else [128, 256]:
        row: dict[str, Any] = {"batch": batch, "dtype": "bf16", "encoder": encoder, "size": size, "not_measured": ""}
        try:
            row |= measure_steps(Bench(asked, batch, "bf16", ["tiled"]), 0.0 if setup.rehearsal else MEASURED_SECONDS)
            shown = f"batch {batch}: {row['images_per_second']:,.0f} images/s, {row['ms_per_step']:.1f} ms"
            shown += f", peak {row['peak_mb']:,.0f} MiB" if row["peak_mb"] is not None else ""
            silent = row["joules_per_image"] is None or row["gpu_utilisation"] is None
            nvml = why_nvml_is_silent(setup) if silent else nvml
            answer.said.append(f"{shown}; {drawn(row, nvml)}")
        except torch.OutOfMemoryError:
            row["not_measured"] = "out of memory"
            answer.said.append(f"batch {batch}: not measured, out of memory")
        if setup.device == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
    measured = [r for r in rows if not r["not_measured"]]
    answer.require(bool(measured), "no batch fits into the device's memory")
    answer.figures = {"rows": rows, "nvml": nvml}
    return answer


def official(folder: Path, setup: Setup, dtype: str) -> Answer:
    """What step.py says of a step of the official kind."""
    options = ["--batches", "128" if setup.gpu_gb > 30 else "32", "--rounds", "5"]
    if setup.rehearsal:
        options = ["--batches", "2", "--rounds", "1", "--encoder", "resnet_small", "--size", "32"]
    line = [sys.executable, str(Path(__file__).with_name("step.py")), "--json", "--dtypes", dtype, *options]
    done = subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr)
        raise WrongError(f"status {done.returncode} of step.py: {done.stderr.strip().splitlines()[-1:]}")
    answer = Answer(json.loads(done.stdout.splitlines()[-1])["figures"])
    (row,) = answer.figures["rows"]
    low, high = row["official_style_over_fast_range"]
    answer.said = [
        f"official / ours {row['official_style_over_fast']:.2f} ({low:.2f}-{high:.2f}) at batch {row['batch']}, masked / ours "
        f"{row['masked_over_fast']:.2f}, memory ours / official {row['peak_fast_over_official']:.2f}"
    ]
    return answer


PARTS = {
    "set": packed_set,
    "digits": digits,
    "packed": packed,
    "resumed": resumed,
    "ranks": ranks,
    "execution": execution,
    "step": step,
    "official_bf16": functools.partial(official, dtype="bf16"),
    "official_fp32": functools.partial(official, dtype="fp32"),
}


def main() -> int:
    """Run one part."""
    name, folder, setup, answer = sys.argv[1:]
    try:
        found = PARTS[name](Path(folder), Setup(**json.loads(setup)))
    except WrongError as error:
        print(error)
        return 1
    Path(answer).write_text(json.dumps({"figures": found.figures, "wrong": found.wrong, "said": found.said}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
