"""The input path: images/s a core against ImageFolder and HDF5, formats, memory of the index, speed of packing, masks.

    python tests/benchmarks/data.py [--json] [--rounds 7] [--images 512] [--pack-images 20000] [--quick] [--folder DIR]

`imagefolder` is torchvision's ImageFolder, transforms v1 on Pillow images, float tensors normalised on the host; `hdf5` the same from
one HDF5 object an image, as the official code reads; `packed` this project's loader on a packed set, uint8; `decoded` on one packed with
--decoded; `loose` on the tree; `short320` and `short256` on sets packed with --short-side and --quality 90, whose pixels are others.
All make batches of 128 views of 224 px from the same 500 generated photographs of about 500 x 375 pixels and 110 kB, in one process on
one thread, files in memory. Each round runs all in turn; figures are medians of the rounds' ratios of processor seconds.
--quick leaves out all but these and the masks.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _data_files import decode_ms, formats, mask_ms, packing, workers
from _data_ways import CPU, differences, exact, scaled, shrunk, take, ways, write_hdf5
from _photographs import photograph, write_tree
from _report import publish
from _turns import in_turn, ratio, spread
from rich.table import Table

_UNIQUE = 500


def prepare(folder: Path) -> list[bytes]:
    """The photographs, and every form in which they are read."""
    write_tree(folder / "tree", _UNIQUE, 20, classes=2, processes=2)
    write_hdf5(folder / "tree", folder / "objects.h5")
    for name, options in (
        ("packed", []),
        ("decoded", ["--decoded"]),
        ("short320", ["--short-side", "320", "--quality", "90"]),
        ("short256", ["--short-side", "256", "--quality", "90"]),
    ):
        line = [sys.executable, "-m", "cnnjepa.data.pack", str(folder / "tree"), str(folder / name), "--workers", "1", *options]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    images = [path.read_bytes() for path in sorted((folder / "tree" / "train").rglob("*.jpg"))]
    (folder / "unique").mkdir()
    for i, data in enumerate(images):
        (folder / "unique" / f"{i}.jpg").write_bytes(data)
    return images


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    images = prepare(folder)
    of = ways(folder)
    times = in_turn(lambda _: {name: take(batches, asked.images) for name, batches in of.items()}, asked.rounds, CPU)
    names = [name for name in of if name != "packed"]
    rows = [
        {
            "way": name,
            "images_per_second": asked.images / statistics.median(times[name]),
            "over_imagefolder": ratio(times, "imagefolder", name),
            "over_imagefolder_range": spread(times, "imagefolder", name),
        }
        for name in of
    ]
    sizes = {
        n: sum(p.stat().st_size for p in (folder / n).glob("train*")) / _UNIQUE / 1e3 for n in ("packed", "decoded", "short320", "short256")
    }
    large = [photograph(number, 2.0) for number in range(20)]
    figures: dict[str, Any] = {
        **{f"packed_over_{name}": ratio(times, name, "packed") for name in names},
        **{f"packed_over_{name}_range": spread(times, name, "packed") for name in names},
        **{f"decoded_over_{name}": ratio(times, name, "decoded") for name in ("imagefolder", "hdf5")},
        "mask_ms_batch128": mask_ms(asked.rounds),
        "kb_per_image": statistics.mean(map(len, images)) / 1e3,
        "decode_ms": decode_ms(images),
        "rows": rows,
        "packed_kb_per_image": sizes,
        "grey_levels_off": {
            "packed": differences(images[:100], exact),
            "short320": differences(images[:100], shrunk(320)),
            "short256": differences(images[:100], shrunk(256)),
            "dct_scaling": differences(images[:100], scaled),
            "dct_scaling_1000x750": differences(large, scaled),
        },
    }
    if not asked.quick:
        figures |= {
            "formats": formats(folder, asked.rounds),
            "index": workers(folder),
            "packing": packing(folder, asked.pack_images, images),
        }
    return figures


def main() -> int:
    """Measure and print; exit status 1 where packing after a kill left other bytes."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=512, help="a way and round")
    parser.add_argument("--pack-images", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", help="where to put about 8 GB for a while; default: the system's temporary folder")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        figures = measure(asked, Path(folder))
    table = Table("way", "images/s a core", "x imagefolder", "range", "packed / it", "range")
    for row in figures["rows"]:
        name = row["way"]
        against = [f"{figures[f'packed_over_{name}']:.2f}", str(figures[f"packed_over_{name}_range"])] if name != "packed" else ["", ""]
        table.add_row(
            name, f"{row['images_per_second']:.0f}", f"{row['over_imagefolder']:.2f}", str(row["over_imagefolder_range"]), *against
        )
    notes = [f"masks of 128 images: {figures['mask_ms_batch128']:.2f} ms; {figures['kb_per_image']:.0f} kB an image"]
    notes += [f"packed, kB an image: {figures['packed_kb_per_image']}"]
    notes += [f"grey levels off Pillow's, {name}: {off}" for name, off in figures["grey_levels_off"].items()]
    notes += [f"{f['format']}: {f['warm_us']:.0f} us warm, {f['cold_us']:.0f} us cold" for f in figures.get("formats", [])]
    notes += [f"{key}: {figures[key]}" for key in ("index", "packing") if key in figures]
    publish(asked.json, asked.rounds, figures, table, notes)
    return 0 if figures.get("packing", {}).get("identical_after_kill", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
