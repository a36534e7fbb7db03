"""Random reads of formats, memory of a large index, and the speed and safety of packing."""

import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from cnnjepa.data.check import sha256_of
from cnnjepa.data.packed import Manifest, PackedFile, PackedImages, read_manifest

_ENTRIES = 1_281_167
_PER_FILE = 8192


def _forget(paths: list[Path]) -> None:
    """Let the system drop the files' pages; they must have been written out."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def formats(folder: Path, rounds: int) -> list[dict[str, object]]:
    """Microseconds to fetch the bytes of a random image, one after the other, warm and from disk, and to open 1 file."""
    loose = sorted((folder / "tree" / "train").rglob("*.jpg"))
    contents = [p.read_bytes() for p in loose]
    bounds = np.cumsum([0, *map(len, contents)])
    with h5py.File(folder / "flat.h5", "w") as file:
        file["bytes"] = np.frombuffer(b"".join(contents), np.uint8)
    with tarfile.open(folder / "images.tar", "w") as tar:
        for path in loose:
            tar.add(path, f"{path.parent.name}/{path.name}")
    with tarfile.open(folder / "images.tar") as tar:
        where = [(m.offset_data, m.size) for m in tar]
    shutil.copytree(folder / "packed", folder / "alone")  # pages that any process has mapped stay in memory
    manifest = read_manifest(folder / "alone")
    flat, objects = h5py.File(folder / "flat.h5")["bytes"], h5py.File(folder / "objects.h5")
    names = [f"{p.parent.name}/{p.name}" for p in loose]
    descriptor = os.open(folder / "images.tar", os.O_RDONLY)
    mapped = [PackedImages(folder / "alone", manifest, "train", manifest.classes)]
    packed = mapped[0].paths

    def arrow(i: int) -> bytes:
        return bytes(mapped[0].pictures([i])[0].data)

    ways: dict[str, tuple[Callable[[int], bytes], list[Path]]] = {
        "loose files": (lambda i: loose[i].read_bytes(), loose),
        "HDF5, one object an image": (lambda i: objects[names[i]][()].tobytes(), [folder / "objects.h5"]),
        "HDF5, flat bytes": (lambda i: flat[bounds[i] : bounds[i + 1]].tobytes(), [folder / "flat.h5"]),
        "tar with an index (pread)": (lambda i: os.pread(descriptor, where[i][1], where[i][0]), [folder / "images.tar"]),
        "Arrow, mapped (ours)": (arrow, packed),
    }
    random, times = np.random.default_rng(0), {name: {"warm": [], "cold": []} for name in ways}
    for _ in range(rounds):
        chosen = random.permutation(len(loose))[:300].tolist()
        for name, (get, files) in ways.items():
            for kind in ("cold", "warm"):
                if kind == "cold":
                    mapped.clear()
                    _forget(files)
                    mapped.append(PackedImages(folder / "alone", manifest, "train", manifest.classes))
                began = time.perf_counter()
                for i in chosen:
                    get(i)
                times[name][kind].append((time.perf_counter() - began) / len(chosen) * 1e6)
    assert all(get(7) == contents[7] for get, _ in ways.values())
    os.close(descriptor)
    return [{"format": name, **{f"{kind}_us": statistics.median(t) for kind, t in of.items()}} for name, of in times.items()]


def large_set(folder: Path, entries: int) -> Path:
    """A packed set of so many images of 8 x 8 pixels."""
    target = folder / f"entries{entries}"
    target.mkdir()
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG", optimize=True)
    files = []
    for number, first in enumerate(range(0, entries, _PER_FILE)):
        count = min(_PER_FILE, entries - first)
        images = pa.array([file.getvalue()] * count, pa.large_binary())
        labels = pa.array(np.arange(first, first + count) // 1300 % 1000, pa.int64())
        path = target / f"train-{number:05}.arrow"
        batch = pa.record_batch([images, labels, pa.array(["n01440764/n01440764_10026.JPEG"] * count)], ["image", "label", "name"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            for start in range(0, count, 256):
                writer.write_batch(batch.slice(start, 256))
        files.append(PackedFile(path.name, "train", count, path.stat().st_size, ""))
    files.append(PackedFile(files[0].name, "val", files[0].images, files[0].bytes, ""))
    Manifest([f"n{i:08}" for i in range(1000)], files).write(target)
    return target


_WORKERS = """
import json, sys, time
import psutil, torch
from _data_ways import ours
from cnnjepa.data_config import DataConfig, DatasetName
from cnnjepa.data.datasets import load_splits
torch.set_num_threads(1)
began = time.perf_counter()
splits = load_splits(DataConfig(DatasetName.imagefolder, root=sys.argv[1]))
opened = time.perf_counter() - began
del splits
batches = ours(sys.argv[1], workers=2)
for _ in range(12):
    next(batches)
time.sleep(1)
found = []
for child in psutil.Process().children():
    fields = {}
    for line in open(f"/proc/{child.pid}/smaps_rollup").read().splitlines()[1:]:
        fields[line.split(":")[0]] = int(line.split()[1]) / 1024
    found.append({"private_dirty": fields["Private_Dirty"], "anonymous_pss": fields["Pss_Anon"],
                  "private": fields["Private_Dirty"] + fields["Private_Clean"]})
print(json.dumps([opened, {k: max(f[k] for f in found) for k in found[0]}]))
"""


def workers(folder: Path) -> dict[str, float]:
    """Seconds to open 1.28 M entries that are not in memory, and MB of a worker process beyond one that has 2,000 entries."""
    import json

    measured = {}
    for entries in (2000, _ENTRIES):
        target = large_set(folder, entries)
        _forget(sorted(target.glob("*.arrow")))
        line = [sys.executable, "-c", _WORKERS, str(target)]
        here = str(Path(__file__).parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path(here).parents[1]), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
        measured[entries] = json.loads(done.stdout)
    (_, few), (opened, many) = measured[2000], measured[_ENTRIES]
    return {"open_seconds": opened, **{f"worker_{k}_mb": many[k] - few[k] for k in few}, "worker_private_mb_whole": many["private"]}


def packing(folder: Path, images: int, source: list[bytes]) -> dict[str, object]:
    """Images/s of packing, of its parts alone, and whether a packing killed half-way and gone on with leaves the same bytes."""
    tree = folder / "many"
    for i in range(images):
        path = tree / ("val" if i % 20 == 0 else "train") / f"class{i // 20 % 2}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "unique" / f"{i % len(source)}.jpg", path)
    line = [sys.executable, "-m", "cnnjepa.data.pack", str(tree)]
    per_file = ["--images-per-file", str(max(images // 10, 1))]
    began, cpu = time.perf_counter(), os.times()
    subprocess.run([*line, str(folder / "whole"), *per_file], check=True, stdout=subprocess.DEVNULL)
    seconds, used = time.perf_counter() - began, os.times()
    begun = subprocess.Popen([*line, str(folder / "killed"), *per_file], stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list((folder / "killed").glob("*.arrow"))) < 5 and begun.poll() is None:
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    kept = len(list((folder / "killed").glob("*.arrow")))
    subprocess.run([*line, str(folder / "killed"), *per_file], check=True, stdout=subprocess.DEVNULL)
    digests = [{p.name: sha256_of(p) for p in (folder / name).iterdir()} for name in ("whole", "killed")]
    written = sum(p.stat().st_size for p in (folder / "whole").iterdir())
    processor = used.children_user + used.children_system - cpu.children_user - cpu.children_system
    return {
        "images": images,
        "images_per_second": images / seconds,
        "mb_per_second": written / 1e6 / seconds,
        "processor_ms_per_image": processor / images * 1e3,
        "decode_ms_per_image": decode_ms(source),
        "files_kept_at_the_kill": kept,
        "identical_after_kill": digests[0] == digests[1],
    }


def decode_ms(images: list[bytes]) -> float:
    """Processor milliseconds of decoding alone."""
    from cnnjepa.data.pictures import EncodedPicture

    began = time.process_time()
    for data in images:
        EncodedPicture(data).pixels()
    return (time.process_time() - began) / len(images) * 1e3


def mask_ms(rounds: int) -> float:
    """Milliseconds of the masks of 128 images, the paper's settings."""
    from cnnjepa.mask_config import MaskConfig
    from cnnjepa.masking import draw_visible

    positions: npt.NDArray[np.int64] = np.arange(128)
    times = []
    for step in range(100 * rounds):
        began = time.process_time()
        draw_visible(MaskConfig(), 7, 0, step, positions)
        times.append((time.process_time() - began) * 1e3)
    return statistics.mean(times)
