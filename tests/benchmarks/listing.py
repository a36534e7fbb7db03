"""Seconds to identify a folder of many images: `python tests/benchmarks/listing.py [--images N] [--json]`.

Makes N files of a few bytes in 1,000 class folders on the local disk, and times the listing that every
run makes, and what its fingerprint adds: with all sizes, and with the names alone.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cnnjepa.data.datasets import load_dataset
from cnnjepa.data.fingerprint import fingerprint
from cnnjepa.data_config import DataConfig, DatasetName


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the median of a few runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        os.environ["XDG_CACHE_HOME"] = str(Path(made) / "cache")
        for split, count in (("train", asked.images), ("val", 50_000)):
            for number in range(1000):
                folder = Path(made) / "set" / split / f"n{number:08}"
                folder.mkdir(parents=True)
                for i in range(max(count // 1000, 1)):
                    (folder / f"n{number:08}_{i}.JPEG").write_bytes(b"\xff" * (1 + (number + i) % 7))
        config = DataConfig(DatasetName.imagefolder, root=str(Path(made) / "set"))
        dataset = load_dataset(config)
        found = {
            "images": len(dataset.train) + len(dataset.test),
            "listing_seconds": seconds(lambda: load_dataset(config)),
            "fingerprint_seconds": seconds(lambda: fingerprint(dataset, config)),
            "names_only_seconds": seconds(lambda: fingerprint(dataset, config, fresh=False)),
        }
    print(json.dumps(found) if asked.json else "\n".join(f"{key}: {value:,.2f}" for key, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
