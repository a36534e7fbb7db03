"""Sets that are staged, and processes that stage them."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jobs.staging import PackedSet, Staging

FILES, BYTES = 8, 300_000
# Goes on until the copy is settled, or stands still in the middle of it; then waits for the end of its standard input.
CHILD = """
import sys
from pathlib import Path
from jobs.staging import PackedSet, Staging
packed, scratch, until = PackedSet.of(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
with Staging(packed, scratch) as staging:
    copied = lambda: len(list(Path(scratch).rglob("file-?")))
    in_a_file = lambda: list(Path(scratch).rglob("*.tmp"))
    while not staging.advance(0) and not (until and copied() >= until and in_a_file()):
        pass
    print("root", staging.root, flush=True)
    print("cause", staging.cause, flush=True)
    sys.stdin.read()
"""


def write_manifest(folder: Path) -> Path:
    """Name the files of `folder` as packing does."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    data = {name: (folder / name).read_bytes() for name in names}
    files = [{"name": n, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest(), "split": "train"} for n, d in data.items()]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def packed(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    random = np.random.default_rng(seed)
    for i in range(FILES):
        (folder / f"file-{i}").write_bytes(random.bytes(BYTES + i))
    return write_manifest(folder)


def set_of(folder: Path) -> PackedSet:
    found = PackedSet.of(folder)
    assert found is not None
    return found


def settle(source: Path, scratch: object) -> Staging:
    with Staging(set_of(source), str(scratch)) as staging:
        deadline = time.monotonic() + 60
        while not staging.advance():
            assert time.monotonic() < deadline
    return staging


def child(source: Path, scratch: Path, until: int = 0, **more: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", CHILD, str(source), str(scratch), str(until)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload, no-any-return]


def end(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    return out


def copied_bytes(said: str) -> list[int]:
    return [int(line.split()[1]) for line in said.splitlines() if "bytes copied" in line]


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    assert all((one / n).read_bytes() == (other / n).read_bytes() for n in names)
