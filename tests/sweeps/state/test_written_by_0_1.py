"""Sweep folders that version 0.1 wrote open in every reader command, and their runs are never mixed with later ones.

The linear probe of 0.1 was another, so that its scores do not compare with today's and its runs have other run IDs: a command that is
typed again runs everything again, beside what was there. The training is the same, loss for loss.

tests/support/v0_1 was written by commit 956edee on CPU: `python sweeps/mask_ratio.py --points 4 --seeds 2` and
`python sweeps/predictor_ablation.py --seeds 1`, small (their commands.jsonl has every override), once to the end and once ended by
`kill -9` in the middle of a trial. Pages and plots are left out: they can be made again.
"""

import csv
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import identity, signature
from sweeps.cli.plan import parse, plan
from sweeps.cli.run import run
from sweeps.mask_ratio import SWEEP as MASK_RATIO
from sweeps.predictor_ablation import SWEEP as ABLATION
from sweeps.spec.sweep import SweepSpec
from tests.support import forked

ROOT = Path(__file__).parents[3]
WRITTEN = ROOT / "tests" / "support" / "v0_1"
RECORDED_ON = ("GenuineIntel", "AVX512")


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


def last_words(folder: Path, *, renamed: bool = True) -> list[str]:
    """The words of the folder's own last command, for where it is now, with today's names or as they were."""
    words: list[str] = json.loads((folder / "commands.jsonl").read_text().splitlines()[-1])["command"]
    words[words.index("--runs-dir") + 1] = str(folder.parent)
    words = ["--max-trials" if word == "--points" else word for word in words]  # 0.1 called the option --points
    return [word.replace("linear_epochs", "linear_paper_epochs") if renamed else word for word in words]


def typed_again(folder: Path, *more: str, renamed: bool = True) -> subprocess.CompletedProcess[str]:
    """Type the folder's own last command again."""
    words = [*last_words(folder, renamed=renamed), *more]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment, check=False)


def run_again(folder: Path) -> dict[str, dict[str, str]]:
    """Type the folder's last command again, agreed that its trials leave the tables; return its results.csv by run ID."""
    done = typed_again(folder, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["signature"]: row for row in csv.DictReader((folder / "results.csv").open())}


def losses(trial: Path) -> dict[int, float]:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def furthest(found: dict[int, float], recorded: dict[int, float]) -> float:
    """The largest relative difference of a step's loss, of the same steps."""
    assert found.keys() == recorded.keys()
    return max(abs(found[step] - recorded[step]) / abs(recorded[step]) for step in recorded)


def processor() -> tuple[str, str]:
    """Its vendor, and the instructions that torch uses of it."""
    return re.findall(r"vendor_id\s*: (\w+)", Path("/proc/cpuinfo").read_text())[0], torch.backends.cpu.get_cpu_capability()


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
    assert [{key: line[key] for key in before[0]} for line in csv.DictReader(table.open())] == before  # beside newer columns
    reader("report", folder)
    page = (folder / "report.html").read_text()
    assert all(row["setting"] in page for row in before)
    for command in ("logs", "study", "advice"):
        assert reader(command, folder)


def name_in_0_1(config: Any) -> str:
    """The run ID that 0.1 gave to the run of `config`."""
    values = identity(config)
    probes = values["probes"]
    probes["linear_epochs"], probes["linear_lr"], probes["batch_size"] = (
        probes.pop(key) for key in ("linear_paper_epochs", "linear_paper_lr", "feature_batch_size")
    )
    for key in ("linear_tolerance", "linear_max_iterations", "linear_paper_batch_size"):
        del probes[key]
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


@pytest.mark.slow
def test_a_run_of_0_1_is_read_and_not_continued(tmp_path: Path) -> None:
    folder = unpacked("half_done_ablation", tmp_path)
    trial = next(folder.glob("trials/*"))
    config = RunFolder(trial).config()
    assert config.probes.linear_paper_epochs == 5
    assert name_in_0_1(config) == trial.name != signature(config)
    with pytest.raises(ValueError, match=r"of this version; got .*, where probes\.batch_size is not yet called probes\.feature_batch_size"):
        RunFolder(trial).prepare(config)
    done = typed_again(folder, renamed=False)
    assert done.returncode == 2
    said = "probes.linear_epochs must be written probes.linear_paper_epochs; got probes.linear_epochs=5: write probes.linear_paper_epochs=5"
    assert done.stderr.strip() == f"error: {said}"


@pytest.mark.parametrize(("name", "spec"), [("half_done_ablation", ABLATION), ("half_done_search", MASK_RATIO)])
def test_the_same_command_finds_its_folder_and_asks_before_the_trials_of_0_1_leave_the_tables(
    tmp_path: Path, name: str, spec: SweepSpec
) -> None:
    folder = unpacked(name, tmp_path)
    words = last_words(folder)[2:]
    assert plan(spec, parse(spec, words))[0].path == folder
    with pytest.raises(
        ValueError, match=r"must keep its trials that have begun; this command leaves out [34] completed, 1 interrupted \(.*--yes"
    ):
        run(spec, words)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.slow
def test_a_half_done_ablation_runs_again_with_the_same_losses(tmp_path: Path) -> None:
    folder, undisturbed = unpacked("half_done_ablation", tmp_path / "half"), unpacked("undisturbed_ablation", tmp_path / "whole")
    counts = json.loads(reader("status", folder, "--json"))["counts"]
    assert {state: n for state, n in counts.items() if n} == {"completed": 4, "interrupted": 1, "waiting": 6}
    before = ended(folder)
    table = run_again(folder)
    old = {name: name_in_0_1(RunFolder(folder / "trials" / name).config()) for name in table}
    assert set(old.values()) == {trial.name for trial in undisturbed.iterdir()}
    assert not set(table) & set(old.values())
    assert {row["state"] for row in table.values()} == {"completed"}
    assert {name: text for name, text in ended(folder).items() if name in before} == before
    apart = [furthest(losses(folder / "trials" / name), losses(undisturbed / old[name])) for name in table]
    if processor() == RECORDED_ON:
        assert max(apart) <= 1e-4
    else:
        # It rounds in another way, and most configurations amplify that: with torch held to SSE, up to 0.054 at some step, while three
        # stayed below 1e-5. Another algorithm changes all of them.
        assert sorted(apart)[2] <= 1e-4
        assert max(apart) <= 0.1


@pytest.mark.nightly
def test_a_half_done_search_starts_again_beside_what_it_chose(tmp_path: Path) -> None:
    folder = unpacked("half_done_search", tmp_path)
    before, chosen = ended(folder), {path.name: path.read_bytes() for path in (folder / "points").iterdir()}
    table = run_again(folder)
    assert not before.keys() & table.keys()
    assert {name: text for name, text in ended(folder).items() if name in before} == before
    assert {name: (folder / "points" / name).read_bytes() for name in chosen} == chosen
    states = [row["state"] for row in table.values()]  # a rung may stop a run: another processor rounds in another way
    assert set(states) <= {"completed", "pruned"}
    assert states.count("completed") >= 2
    assert len({row["setting"] for row in table.values()}) == 4


def test_the_fixtures_can_be_distinguished_from_later_ones(tmp_path: Path) -> None:
    for name in ("finished_search", "half_done_search", "half_done_ablation"):
        folder = unpacked(name, tmp_path / name)
        assert json.loads((folder / "commands.jsonl").read_text())["commit"].startswith("956edee")
        shutil.rmtree(folder)
