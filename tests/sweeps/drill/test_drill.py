"""The drill holds where the project is whole, and fails where a resumed run forgets anything: it can fail."""

import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from sweeps.drill import campaign, file_faults
from sweeps.drill.campaign import Drill, Injected, order, verdict
from sweeps.drill.compare import Proof, compare_records, compare_rows, compare_states
from sweeps.drill.observed import WatchedRun
from sweeps.drill.summary import by_kind, equalities, figures, report
from tests.support import forked
from tests.support.documented import typed
from tests.support.held import wait_until
from tests.support.sample import sampled, seeded
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[3]
METRICS = '{"kind": "step", "step": %d, "epoch": 0.1, "images_per_second": %s}\n'
STATE = {
    "step": 3,
    "method": {"a.weight": torch.ones(4), "bn.running_mean": torch.zeros(2)},
    "optimizer": {"state": {0: {"m": torch.ones(3)}}},
}


def drill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    line = [sys.executable, "-m", "jobs.drill", *arguments]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=580, check=False)


def nothing_is_lost(faults: int, *options: str) -> None:
    done = drill(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("NOTHING IS LOST\n")
    assert re.search(rf"^ +\d+\.\d s  {faults}/{faults} run \d: .* steps repeated, \d+\.\d s lost$", done.stdout, re.M)
    assert done.stdout.count("equal bit for bit") == 6
    assert "runs lost: 0; duplicated records or rows: 0; differing bits: 0" in done.stdout


@pytest.mark.nightly
def test_20_faults_lose_nothing() -> None:
    nothing_is_lost(20, "--faults", "20", "--seed", "1")


@pytest.mark.slow
@seeded
def test_a_few_faults_lose_nothing(seed: str, tmp_path: Path) -> None:
    places = {"100": "2", "7": seed, "runs": str(tmp_path)}
    nothing_is_lost(2, *typed("python -m jobs.drill --faults 100 --seed 7 --runs-dir runs", places)[3:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forgotten", "noticed"),
    sampled(
        [pytest.param(what, by, id=what) for what, by in (("moments", "moments"), ("sampler", "metrics"), ("rng", "metrics"))],
        1,
        "forgotten",
    ),
)
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
    wait_until("metrics", lambda: list(tmp_path.glob("*/undisturbed/*/trials/*/metrics.jsonl")), lambda: child.poll() is None)
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
        (["--cluster", "nowhere"], "error: cluster must be one of .*; got nowhere: give a profile of your own by its path, .*"),
        (["--cluster", "komondor"], "error: cluster.account must be given for cluster komondor; got none: add account=VALUE"),
        (["epochs=x"], "error: epochs must be of type integer; got x"),
        (["--runs-dir", "/proc/none"], "error: --runs-dir must be a folder that can be written; got /proc/none: .*"),
    ],
)
def test_wrong_usage_ends_with_one_line_and_2(arguments: list[str], said: str) -> None:
    done = forked.run(["-m", "jobs.drill", *arguments])
    assert done.returncode == 2
    assert re.fullmatch(said, done.stderr.strip())
    assert done.stdout == ""


def test_a_dry_run_shows_what_a_cluster_would_be_given() -> None:
    done = forked.run(["-m", "jobs.drill", "--cluster", "komondor", "--dry-run", "account=abc"])
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --account=abc", "#SBATCH --gres=gpu:4", "#SBATCH --time=60", "#SBATCH --requeue", "#SBATCH --ntasks-per-node=4"):
        assert line in done.stdout
    assert "sweeps.execution.worker_main" in done.stdout


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


def test_a_zero_of_another_sign_and_a_nan_are_compared_by_their_bits() -> None:
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


def test_records_are_compared_with_each_other_but_for_times() -> None:
    reference = [{"kind": "step", "step": s, "loss": 0.5, "images_per_second": 3.0} for s in (1, 2)]
    proof = Proof()
    compare_records(proof, [{**r, "images_per_second": 9.0} for r in reference], reference)
    assert proof.holds
    compare_records(proof, [*reference, reference[1]], reference)
    assert proof.duplicated == ["step record of step 2"]
    assert proof.different["metrics"] == ["3 records instead of 2, from the 3th on"]


def test_rows_are_compared_with_each_other(tmp_path: Path) -> None:
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
    found = Drill(0.1, injected=[Injected("SIGKILL of a rank", 5, 2, 1.5)], proofs=[Proof()])
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
    file_faults.flip_a_bit(tmp_path / "checkpoints", random.Random(1))
    flipped = saved.path.read_bytes()
    assert sum((a ^ b).bit_count() for a, b in zip(whole, flipped, strict=True)) == 1
    file_faults.truncate(tmp_path / "checkpoints", random.Random(1))
    assert len(saved.path.read_bytes()) < len(whole)
    hidden = file_faults.hide_newest(tmp_path / "checkpoints", tmp_path / "aside")
    assert checkpoint.find(tmp_path / "checkpoints") == []
    file_faults.show_again(hidden, tmp_path / "checkpoints")
    assert len(checkpoint.find(tmp_path / "checkpoints")) == 1
    with file_faults.read_only(tmp_path):
        assert (tmp_path / "checkpoints").stat().st_mode & 0o777 == 0o555
    assert (tmp_path / "checkpoints").stat().st_mode & 0o200


class Scripted:
    """A run with a fault injected at step 12, feels it at 14, and starts again at 10; each look takes a second."""

    def __init__(self, looks: list[tuple[int, int]]) -> None:
        self.run, self.looks, self.clock, self.now = self, iter(looks), 0.0, (1, 12)

    def keep_alive(self) -> None:
        self.clock += 1
        self.now = next(self.looks)

    def step(self) -> int:
        return self.now[1]

    def attempt(self) -> int:
        return self.now[0]

    def log_size(self) -> int:
        return 0

    def ended(self) -> bool:
        return False

    def resumed_at(self, log_start: int) -> int | None:
        return 10 if self.now[0] > 1 else None


@pytest.mark.parametrize(
    ("starts_again", "looks", "repeated", "lost"),
    [
        (True, [(1, 14), (2, 10), (2, 14), (2, 15)], 4, 4 - 3 * 0.25),
        (False, [(1, 14), (1, 15), (1, 16)], 0, 3 - 4 * 0.25),
        (False, [(1, 16)], 0, 0.0),  # faster than an undisturbed run
    ],
)
def test_a_fault_costs_the_steps_and_seconds_until_all_that_was_reached_is_passed(
    starts_again: bool, looks: list[tuple[int, int]], repeated: int, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scripted(looks)
    scene.faults = {"fault": lambda _: starts_again}  # type: ignore[attr-defined]
    monkeypatch.setattr(campaign, "time", SimpleNamespace(monotonic=lambda: scene.clock))
    injected = campaign.inject(scene, "fault", random.Random(0), 0.25)  # type: ignore[arg-type]
    assert next(scene.looks, None) is None
    assert injected == Injected("fault", 12, repeated, lost)


def test_a_drill_adds_up_what_its_proofs_found() -> None:
    proofs = [
        Proof(different_bits=3, different={"metrics": ["a", "b"]}, duplicated=["c"]),
        Proof(lost="d", different={"table rows": ["e"]}),
    ]
    found = Drill(0.1, proofs=proofs)
    assert (found.different_bits, found.duplicated, found.lost) == (6, 1, 1)
    assert not found.holds
    assert not Drill(0.1).holds  # nothing was compared
    assert Drill(0.1, proofs=[Proof()]).holds


def test_kinds_are_reported_with_what_they_cost_the_most_expensive_first_and_what_was_not_compared_is_said() -> None:
    injected = [Injected("a", 1, 2, 1.0), Injected("b", 2, 3, 5.0), Injected("a", 3, 4, 4.0)]
    proof = Proof()
    proof.compared.update({"weights": 3, "metrics": 2})
    proof.differs("metrics", "two of them")
    found = Drill(0.1, injected=injected, proofs=[proof])
    assert by_kind(found) == [("b", 1, 3, 5.0, 5.0), ("a", 2, 6, 2.5, 4.0)]
    assert [line.split(":")[1].strip() for line in equalities(found)] == [
        "equal bit for bit",
        "NOT COMPARED",
        "NOT COMPARED",
        "DIFFERENT",
        "NOT COMPARED",
        "NOT COMPARED",
    ]


def test_values_and_rows_that_are_only_in_one_differ(tmp_path: Path) -> None:
    proof = Proof()
    proof.compare_values("probe results", "p", {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2, "d": 3}, "e": 4})
    proof.compare_values("probe results", "q", {"f": 5}, {})
    assert sorted(proof.different["probe results"]) == ["p.b.d: None instead of 3", "p.e: None instead of 4", "q.f: 5 instead of None"]
    head = "signature,setting,linear.test_top1,seconds\n"
    (tmp_path / "one.csv").write_text(head + "x,s,51.5,10\n")
    (tmp_path / "two.csv").write_text(head + "x,s,51.5,10\ny,t,60.0,10\n")
    for ours, theirs in (("one", "two"), ("two", "one")):
        proof = Proof()
        compare_rows(proof, tmp_path / f"{ours}.csv", tmp_path / f"{theirs}.csv")
        assert len(proof.different["table rows"]) == 3  # signature, configuration and score of the row that is missing


def test_what_is_seen_of_a_run_is_its_newest(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path)
    assert (run.step(), run.saved_step(), run.attempt(), run.gained()) == (0, -1, 0, False)
    folder = RunFolder(tmp_path)
    folder.prepare(tiny_config(global_batch_size=32))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(METRICS % line for line in [(7, 16.0), (8, 64.0), (9, 1000.0)]) + '{"kind": "step", "step": 10'
    )
    assert run.step() == 9
    assert run.seconds_a_step() == 0.5
    (tmp_path / "claim").mkdir(exist_ok=True)
    for epoch, step in ((1, 0), (2, 4)):
        (tmp_path / "claim" / f"{epoch:06}.json").write_text(json.dumps({"epoch": epoch, "step": step}))
    assert run.attempt() == 2
    for step, gained in ((4, False), (5, True)):
        checkpoint.save(tmp_path / "checkpoints", step, {"w": torch.zeros(3)}, keep=2)
        assert (run.saved_step(), run.gained()) == (step, gained)
    (tmp_path / "log").mkdir(exist_ok=True)
    log = tmp_path / "log" / "train.log"
    log.write_text("resuming abc at step 3 of 10\n")
    before = run.log_size()
    assert run.resumed_at(0) == 3
    assert run.resumed_at(before) is None
    log.write_text(log.read_text() + "resuming abc at step 4 of 10\nresuming abc at step 5 of 10\n")
    assert run.resumed_at(before) == 5
