"""Sweep folders that version 0.1 wrote open in every reader command, and half-done ones resume where they stopped.

tests/support/v0_1 was written by commit 956edee on CPU: `python sweeps/mask_ratio.py --points 4 --seeds 2` and
`python sweeps/predictor_ablation.py --seeds 1`, small (their commands.jsonl has every override), once to the end and once ended by
`kill -9` in the middle of a trial. Pages and plots are left out: they can be made again.
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support import forked

ROOT = Path(__file__).parents[3]
WRITTEN = ROOT / "tests" / "support" / "v0_1"


def unpacked(name: str, to: Path) -> Path:
    with tarfile.open(WRITTEN / f"{name}.tar.gz") as archive:
        archive.extractall(to, filter="data")
    (folder,) = to.iterdir()
    # This machine is the laptop, started again since: a claim of another host is waited for, as its owner may still run.
    for path in folder.glob("trials/*/claim/*.json"):
        claim = json.loads(path.read_text())
        claim["owner"] |= {"host": platform.node(), "boot": "an earlier one"}
        path.write_text(json.dumps(claim))
    return folder


def reader(command: str, folder: Path, *more: str) -> str:
    done = forked.run(["-m", "sweeps", command, str(folder), *more])
    assert done.returncode == 0, done.stderr
    return done.stdout


def resumed(folder: Path) -> dict[str, dict[str, str]]:
    """Type the folder's own last command again; return its results.csv by run ID."""
    words = json.loads((folder / "commands.jsonl").read_text().splitlines()[-1])["command"]
    words[words.index("--runs-dir") + 1] = str(folder.parent)
    words = ["--max-trials" if word == "--points" else word for word in words]  # 0.1 called the option --points
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["signature"]: row for row in csv.DictReader((folder / "results.csv").open())}


def losses(trial: Path) -> dict[int, float]:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def ended(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("trials/*/result.json")}


def test_a_finished_sweep_opens_in_every_reader(tmp_path: Path) -> None:
    folder = unpacked("finished_search", tmp_path)
    counts = json.loads(reader("status", folder, "--json"))["counts"]
    assert {state: n for state, n in counts.items() if n} == {"completed": 6}
    table = folder / "results.csv"
    before = list(csv.DictReader(table.open()))
    table.unlink()
    assert "10.8" in reader("results", folder)  # the baseline's linear top-1 on the test split, of two seeds
    assert list(csv.DictReader(table.open())) == before
    reader("report", folder)
    page = (folder / "report.html").read_text()
    assert all(row["setting"] in page for row in before)
    for command in ("logs", "study", "advice"):
        assert reader(command, folder)


@pytest.mark.slow
def test_a_half_done_ablation_resumes(tmp_path: Path) -> None:
    folder, undisturbed = unpacked("half_done_ablation", tmp_path / "half"), unpacked("undisturbed_ablation", tmp_path / "whole")
    counts = json.loads(reader("status", folder, "--json"))["counts"]
    assert {state: n for state, n in counts.items() if n} == {"completed": 4, "interrupted": 1, "waiting": 6}
    before = ended(folder)
    table = resumed(folder)
    assert table.keys() == {trial.name for trial in undisturbed.iterdir()}  # the names of runs are those of 0.1
    assert {row["state"] for row in table.values()} == {"completed"}
    assert {name: text for name, text in ended(folder).items() if name in before} == before
    (half,) = [name for name in table if json.loads((folder / "trials" / name / "result.json").read_text())["resumes"]]
    assert f"resuming {half} at step 13 of 40" in (folder / "trials" / half / "log" / "train.log").read_text()
    for name in table:
        # Another processor may round in another way; another algorithm differs by far more.
        assert losses(folder / "trials" / name) == pytest.approx(losses(undisturbed / name), rel=1e-4)


@pytest.mark.slow
def test_a_half_done_search_resumes(tmp_path: Path) -> None:
    folder = unpacked("half_done_search", tmp_path)
    before, chosen = ended(folder), {path.name: path.read_bytes() for path in (folder / "points").iterdir()}
    table = resumed(folder)
    assert before.keys() < table.keys()
    assert {name: text for name, text in ended(folder).items() if name in before} == before
    assert {name: (folder / "points" / name).read_bytes() for name in chosen} == chosen
    assert [row["state"] for row in table.values()] == ["completed"] * 6
    assert len({row["setting"] for row in table.values()}) == 4


def test_the_fixtures_can_be_distinguished_from_later_ones(tmp_path: Path) -> None:
    for name in ("finished_search", "half_done_search", "half_done_ablation"):
        folder = unpacked(name, tmp_path / name)
        assert json.loads((folder / "commands.jsonl").read_text())["commit"].startswith("956edee")
        shutil.rmtree(folder)
