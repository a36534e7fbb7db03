"""The parts of on_cuda.py, each run as `python _cuda_parts.py NAME FOLDER SETUP ANSWER`, which writes what it found to ANSWER.

SETUP is the JSON of a Setup.
"""

import functools
import io
import json
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _cuda_run import (
    ROOT,
    Answer,
    Setup,
    WrongError,
    completed,
    drawn,
    judge_run,
    kill_halfway,
    losses_apart,
    pretrain_line,
    why_nvml_is_silent,
)

# What needs torch imports it where it is used: a part that only starts runs does not pay for it.
RANKS_TOLERANCE = 1e-9  # of losses in float64, R ranks against one
CLASSES = 4
WARM_STEPS, MEASURED_SECONDS = 20, 5.0
_TRIES = 3


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
