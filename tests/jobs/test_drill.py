"""The drill holds where the project is whole, and fails where a resumed run forgets anything: it can fail."""

import copy
import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from cnnjepa import checkpoint
from jobs.drills import damage
from jobs.drills.campaign import Drill, Struck, order, verdict
from jobs.drills.proof import Proof, compare_records, compare_rows, compare_states
from jobs.drills.report import figures, report
from tests.documented import typed

ROOT = Path(__file__).parents[2]
STATE = {
    "step": 3,
    "method": {"a.weight": torch.ones(4), "bn.running_mean": torch.zeros(2)},
    "optimizer": {"state": {0: {"m": torch.ones(3)}}},
}


def drill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "jobs.drill", *arguments]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=580, check=False)


@pytest.mark.slow
def test_20_faults_lose_nothing(tmp_path: Path) -> None:
    places = {"100": "20", "7": "1", "runs": str(tmp_path)}
    done = drill(*typed("python -m jobs.drill --faults 100 --seed 7 --runs-dir runs", places)[3:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("NOTHING IS LOST\n")
    assert re.search(r"^ +\d+\.\d s  20/20 run \d: .* steps repeated, \d+\.\d s lost$", done.stdout, re.M)
    assert done.stdout.count("equal bit for bit") == 6
    assert "runs lost: 0; records or rows there twice: 0; differing bits: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("forgotten", "noticed"), [("moments", "moments"), ("sampler", "metrics"), ("rng", "metrics")])
def test_a_run_that_forgets_anything_when_it_is_resumed_is_found_out(forgotten: str, noticed: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent / "sabotage"), os.environ.get("PYTHONPATH", "")])
    done = drill("--faults", "1", "--seed", "1", "epochs=8", "probes.every_epochs=0", PYTHONPATH=path, DRILL_SABOTAGE=forgotten)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.endswith("THE DRILL HAS FAILED\n")
    assert re.search(rf"^  {noticed} +[\d,]+ compared: DIFFERENT: ", done.stdout, re.M)


@pytest.mark.slow
def test_a_drill_that_is_ended_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    line = typed("python -m jobs.drill", {"python": sys.executable})
    child = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/undisturbed/*/trials/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    below = psutil.Process(child.pid).children(recursive=True)
    assert len(below) > 3
    child.terminate()
    assert child.wait(60) == 130
    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []
    assert list(tmp_path.glob("cnnjepa-*")) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--faults", "0"], "error: --faults must be at least 1; got 0"),
        (["--cluster", "nowhere"], "error: cluster must be one of .*; got nowhere"),
        (["--cluster", "komondor"], "error: cluster.account must be given for cluster komondor; got none: add account=VALUE"),
        (["epochs=x"], "error: epochs must be of type integer; got x"),
        (["--runs-dir", "/proc/none"], "error: --runs-dir must be a folder that can be written; got /proc/none: .*"),
    ],
)
def test_wrong_usage_ends_with_one_line_and_2(arguments: list[str], said: str) -> None:
    done = drill(*arguments)
    assert done.returncode == 2
    assert re.fullmatch(said, done.stderr.strip())
    assert done.stdout == ""


def test_a_dry_run_shows_what_a_cluster_would_be_given() -> None:
    done = drill("--cluster", "komondor", "--dry-run", "account=abc")
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --account=abc", "#SBATCH --gres=gpu:4", "#SBATCH --time=60", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=4"):
        assert line in done.stdout
    assert "sweeps.engine.rank" in done.stdout


def test_each_kind_comes_once_before_any_comes_twice_and_the_seed_decides() -> None:
    kinds = [str(i) for i in range(13)]
    first = list(itertools.islice(order(kinds, 5), 26))
    assert Counter(first[:13]) == Counter(first[13:]) == Counter(kinds)
    assert first == list(itertools.islice(order(kinds, 5), 26))
    assert first != list(itertools.islice(order(kinds, 6), 26))
    assert first[:13] != first[13:]


def copied() -> dict:
    return copy.deepcopy(STATE)


def test_one_bit_is_found_and_named() -> None:
    proof, other = Proof(), copied()
    compare_states(proof, copied(), STATE)
    assert proof.holds
    assert proof.compared == {"weights": 1, "running statistics": 1, "moments": 1}
    other["optimizer"]["state"][0]["m"].view(torch.int32)[1] ^= 1
    compare_states(proof, other, STATE)
    assert (proof.different_bits, proof.different) == (1, {"moments": ["optimizer.state.0.m: 1 bits"]})
    assert not proof.holds
    assert verdict(proof) == "DIFFERS: moments: optimizer.state.0.m: 1 bits"


def test_a_zero_of_another_sign_and_a_nan_are_told_by_their_bits() -> None:
    proof, a, b = Proof(), copied(), copied()
    a["method"]["bn.running_mean"] = torch.tensor([-0.0, float("nan")])
    b["method"]["bn.running_mean"] = torch.tensor([0.0, float("nan")])
    compare_states(proof, a, b)
    assert proof.different == {"running statistics": ["method.bn.running_mean: 1 bits"]}


def test_what_is_missing_or_another_step_differs() -> None:
    proof, other = Proof(), copied()
    del other["method"]["a.weight"]
    other["step"] = 4
    compare_states(proof, other, STATE)
    assert len(proof.different["weights"]) == 2


def test_records_are_held_against_each_other_but_for_times() -> None:
    twin = [{"kind": "step", "step": s, "loss": 0.5, "images_per_second": 3.0} for s in (1, 2)]
    proof = Proof()
    compare_records(proof, [{**r, "images_per_second": 9.0} for r in twin], twin)
    assert proof.holds
    compare_records(proof, [*twin, twin[1]], twin)
    assert proof.duplicated == ["step record of step 2"]
    assert proof.different["metrics"] == ["3 records instead of 2, from the 3th on"]


def test_rows_are_held_against_each_other(tmp_path: Path) -> None:
    head = "signature,setting,linear.test_top1,seconds\n"
    (tmp_path / "a.csv").write_text(head + "x,s,51.5,10\n")
    (tmp_path / "b.csv").write_text(head + "x,s,51.5,20\n")
    (tmp_path / "c.csv").write_text(head + "x,s,51.6,10\nx,s,51.6,10\n")
    proof = Proof()
    compare_rows(proof, tmp_path / "a.csv", tmp_path / "b.csv")
    assert proof.holds
    compare_rows(proof, tmp_path / "c.csv", tmp_path / "b.csv")
    assert proof.duplicated == ["row of x"]
    assert proof.different["table rows"][0] == "s.linear.test_top1: 51.6 instead of 51.5"


def test_a_drill_with_fewer_faults_than_asked_or_a_lost_run_has_failed() -> None:
    found = Drill(0.1, 10.0, struck=[Struck("SIGKILL of a rank", 5, 2, 1.5)], proofs=[Proof()])
    assert found.holds
    assert figures(found)["seconds_lost_mean"] == 1.5
    assert report(found, 1).endswith("NOTHING IS LOST")
    assert report(found, 2).endswith("THE DRILL HAS FAILED")
    found.proofs.append(Proof(lost="failed: its process died"))
    assert not found.holds
    assert "runs lost: 1" in report(found, 1)


def test_damage_is_what_it_says_and_read_only_passes(tmp_path: Path) -> None:
    saved = checkpoint.save(tmp_path / "checkpoints", 1, {"w": torch.zeros(1000)}, keep=2)
    whole = saved.path.read_bytes()
    damage.flip_a_bit(tmp_path / "checkpoints", random.Random(1))
    flipped = saved.path.read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(whole, flipped, strict=True)) == 1
    damage.truncate(tmp_path / "checkpoints", random.Random(1))
    assert len(saved.path.read_bytes()) < len(whole)
    hidden = damage.hide_newest(tmp_path / "checkpoints", tmp_path / "aside")
    assert checkpoint.find(tmp_path / "checkpoints") == []
    damage.show_again(hidden, tmp_path / "checkpoints")
    assert len(checkpoint.find(tmp_path / "checkpoints")) == 1
    with damage.read_only(tmp_path):
        assert (tmp_path / "checkpoints").stat().st_mode & 0o777 == 0o555
    assert (tmp_path / "checkpoints").stat().st_mode & 0o200
