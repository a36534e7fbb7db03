"""Which faults are a node's: by their text, by the trials that failed there, and never more nodes than a share."""

import itertools
import os
import random
from pathlib import Path

import pytest

from jobs.slurm.nodes import (
    EXPIRY_HOURS,
    Fault,
    FaultKind,
    Nodes,
    avoided,
    blamed_nodes,
    is_aftermath,
    is_charged,
    points_to_node,
    suspects,
)


def fault(trial: str, *nodes: str, kind: FaultKind = FaultKind.error, cause: str = "RuntimeError: odd", time: float = 1.0) -> Fault:
    return Fault(trial, 1, "7_1", list(nodes), kind, cause, time)


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment",
        "AcceleratorError: CUDA error: no CUDA-capable device is detected",
        "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable".replace("device(s) is/are", "devices are"),
        "ValueError: device must be cpu or auto where torch sees no CUDA device; got cuda",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)",
        "NVML: Driver/library version mismatch",
        "OSError: [Errno 116] Stale file handle: '/scratch/set/train-0003.bin'",
        "OSError: [Errno 107] Transport endpoint is not connected: '/project/runs'",
        "OSError: [Errno 5] Input/output error",
        "slurmstepd: error: Prolog failed on gpu03",
        "mount: /scratch: special device nvme0n1 does not exist.",
    ],
)
def test_texts_of_a_node(text: str) -> None:
    assert points_to_node(text)
    assert not is_aftermath(text)


@pytest.mark.parametrize(
    "text",
    [
        "NonFiniteError: loss nan and gradient norm nan must be finite: step 3, learning rate 1e+30",
        "ValueError: encoder.width must be at least 1; got 0",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "RuntimeError: CUDA error: device-side assert triggered",
        "FileNotFoundError: [Errno 2] No such file or directory: '/data/not mounted/NVML driver/Xid.png'",
        "KeyError: 'uncorrectable'",
        "OSError: cannot read /data/mount: /prolog failed.png",
        "OSError: [Errno 28] No space left on device",
    ],
)
def test_texts_of_a_program(text: str) -> None:
    assert not points_to_node(text)


def test_srun_names_the_node_whose_rank_died() -> None:
    log = "step 3/9\nsrun: error: gpu02: task 5: Segmentation fault\nsrun: error: gpu01: task 0: Terminated\n"
    assert blamed_nodes(log, ["gpu01", "gpu02"]) == ["gpu02"]
    assert blamed_nodes("step 3/9\n", ["gpu01", "gpu02"]) == ["gpu01", "gpu02"]


def test_one_fault_of_a_node_is_enough_and_one_of_a_program_is_not() -> None:
    assert list(suspects([fault("t1", "a", kind=FaultKind.node)])) == ["a"]
    assert list(suspects([fault("job 3", "a", kind=FaultKind.setup)])) == ["a"]
    assert suspects([fault("t1", "a")]) == {}
    assert suspects([fault("t1", "a"), fault("t1", "a", time=2.0)]) == {}
    assert list(suspects([fault("t1", "a"), fault("t2", "a", cause="KeyError: other")])) == ["a"]


def test_a_fault_that_follows_the_trial_speaks_against_no_node() -> None:
    both = [fault("t1", "a", kind=FaultKind.node), fault("t1", "b", kind=FaultKind.node)]
    assert suspects(both) == {}
    assert is_charged("t1", both, [])
    # Another trial shows that b is bad; so what happened there says nothing about the first one.
    third = fault("t2", "b", kind=FaultKind.node)
    assert set(suspects([*both, third])) == {"a", "b"}
    assert not is_charged("t1", [*both, third], ["a", "b"])
    assert is_charged("t1", [*both, third], ["b"])


def test_another_error_elsewhere_is_another_fault() -> None:
    faults = [fault("t1", "a"), fault("t1", "b", cause="ValueError: its own"), fault("t2", "a")]
    assert list(suspects(faults)) == ["a"]
    assert is_charged("t1", faults, ["a"])
    assert not is_charged("t2", faults, ["a"])


def test_the_same_error_elsewhere_is_the_programs() -> None:
    there = [fault("t1", "a", cause="IndexError: 3 of '/x/1'"), fault("t2", "a", cause="IndexError: 5 of '/x/2'")]
    assert list(suspects(there)) == ["a"]
    assert suspects([*there, fault("t3", "b", cause="IndexError: 9 of '/x/3'")]) == {}
    assert list(suspects([*there, fault("t3", "b", cause="KeyError: 9")])) == ["a"]


def test_two_hangs_on_one_node_and_not_one_on_each_of_two() -> None:
    one, again = fault("t1", "a", kind=FaultKind.hang), fault("t1", "a", kind=FaultKind.hang, time=2.0)
    assert suspects([one]) == {}
    assert list(suspects([one, fault("t2", "a", kind=FaultKind.hang)])) == ["a"]
    assert list(suspects([one, again])) == ["a"]
    assert suspects([one, fault("t2", "b", kind=FaultKind.hang)]) == {}
    assert suspects([one, again, fault("t1", "b", kind=FaultKind.hang)]) == {}, "it follows the trial"


def test_deaths_that_repeat_are_the_nodes_until_they_follow_the_trial() -> None:
    one, elsewhere = fault("t1", "a", kind=FaultKind.death), fault("t1", "b", kind=FaultKind.death)
    assert list(suspects([one])) == ["a"]
    assert suspects([one, elsewhere]) == {}
    assert list(suspects([one, elsewhere, fault("t2", "a", kind=FaultKind.death)])) == ["a", "b"]


def test_ranks_on_two_nodes_point_to_the_node_that_they_share() -> None:
    pairs = [fault("t1", "a", "b"), fault("t2", "b", "c"), fault("t3", "a", "c", cause="KeyError: own")]
    assert list(suspects(pairs[:2])) == ["b"]
    assert list(suspects(pairs)) == ["b"]


@pytest.mark.parametrize(("total", "most"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (10, 5)])
def test_never_more_than_half_of_the_nodes(total: int, most: int) -> None:
    sure = [fault(f"t{i}", f"n{i}", kind=FaultKind.node) for i in range(8)]
    assert len(avoided(sure, total)) == most
    counted = [fault(f"t{i}{j}", f"n{i}", cause=f"{'abcdefgh'[i]}") for i in range(8) for j in range(2)]
    assert len(suspects(counted)) == 8
    assert len(avoided(counted, total)) == most
    assert list(avoided([*counted, *sure[7:]], total))[:1] == ["n7"][:most], "the surest first"


def test_with_one_node_nothing_is_avoided_and_every_trial_pays_at_once() -> None:
    faults = [fault("t1", "a", kind=FaultKind.node)]
    assert avoided(faults, 1) == {}
    assert is_charged("t1", faults, avoided(faults, 1))


def fate(
    seed: int, bad: set[str], broken: set[str], text: str, nodes: int = 3, parallel: int = 3, trials: int = 12
) -> dict[str, list[str]]:
    """Run trials by the rules alone; those of `broken` fail anywhere. Return where each lost a start, and which failed."""
    draw, names = random.Random(seed), [f"n{i}" for i in range(nodes)]
    faults: list[Fault] = []
    done: set[str] = set()
    failed: set[str] = set()
    lost: dict[str, list[str]] = {}
    for now in itertools.count(1):
        waiting = [t for t in (f"t{i}" for i in range(trials)) if t not in done | failed]
        if not waiting:
            return {**lost, "failed": sorted(failed)}
        assert now < 200, "no end"
        free = [n for n in names if n not in avoided(faults, nodes)]
        for trial, node in zip(waiting[:parallel], draw.sample(free, len(free)), strict=False):
            if node in avoided(faults, nodes):
                continue  # found meanwhile
            if node not in bad and trial not in broken:
                done.add(trial)
                continue
            cause = text if node in bad else "ValueError: own"
            kind = FaultKind.node if points_to_node(cause) else FaultKind.error
            faults.append(fault(trial, node, kind=kind, cause=cause, time=float(now)))
            lost.setdefault(trial, []).append(node)
            failed.add(trial)
        failed = {t for t in failed if is_charged(t, faults, avoided(faults, nodes))}
    raise AssertionError


@pytest.mark.parametrize("text", ["CUDA error: uncorrectable ECC error", "RuntimeError: flux 17"])
@pytest.mark.parametrize("seed", range(40))
def test_one_bad_node_of_three_loses_no_trial(text: str, seed: int) -> None:
    found = fate(seed, {"n1"}, set(), text)
    assert found.pop("failed") == []
    assert sum(map(len, found.values())) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_trials_that_fail_anywhere_fail_after_few_starts_beside_a_bad_node(seed: int) -> None:
    found = fate(seed, {"n1"}, {"t2", "t7"}, "RuntimeError: flux 17")
    assert found.pop("failed") == ["t2", "t7"]
    assert all(len(found[t]) <= 3 for t in ("t2", "t7"))


@pytest.mark.parametrize(("nodes", "parallel"), [(3, 3), (20, 3), (20, 20), (3, 1)])
@pytest.mark.parametrize("seed", range(10))
def test_a_program_that_fails_everywhere_costs_few_more_starts(nodes: int, parallel: int, seed: int) -> None:
    found = fate(seed, set(), {f"t{i}" for i in range(12)}, "", nodes, parallel)
    assert len(found.pop("failed")) == 12
    assert sum(map(len, found.values())) <= 12 + 4


@pytest.mark.parametrize("seed", range(20))
def test_two_bad_nodes_of_ten(seed: int) -> None:
    found = fate(seed, {"n1", "n4"}, set(), "NVML: Driver/library version mismatch", nodes=10, parallel=6)
    assert len(found.pop("failed")) <= 1  # one that met both before any other showed that both are bad


def test_what_is_written_is_read_expires_and_is_forgotten_when_cleared(tmp_path: Path) -> None:
    now = [1000.0]
    nodes = Nodes(tmp_path / "nodes", clock=lambda: now[0])
    assert (nodes.live(), nodes.avoided(), nodes.lines(), nodes.total) == ([], {}, [], 0)
    nodes.know(["a", "b", "c"], 1)
    nodes.record(fault("t1", "a", kind=FaultKind.node, cause="NVML", time=1000.0))
    nodes.record(fault("t1", "a", kind=FaultKind.node, cause="a later one of the same rank", time=1001.0))
    assert [f.cause for f in nodes.live()] == ["NVML"]
    assert nodes.has("t1", 1)
    assert not nodes.has("t1", 2)
    assert list(nodes.avoided()) == ["a"]
    assert "node a is avoided until" in nodes.lines()[0]
    now[0] += EXPIRY_HOURS * 3600 + 1
    assert nodes.avoided() == {}
    now[0] = 1100.0
    nodes.clear("a")
    assert nodes.avoided() == {}
    nodes.record(fault("t2", "a", kind=FaultKind.setup, time=1200.0))
    assert list(nodes.avoided()) == ["a"]


def test_a_job_finds_as_many_nodes_as_it_takes(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "nodes", clock=lambda: 2.0)
    nodes.record(fault("t1", "a", kind=FaultKind.node))
    for needed, kept_off in ((1, ["a"]), (2, ["a"]), (3, []), (4, [])):
        nodes.know(["a", "b", "c"], needed)
        assert list(nodes.avoided()) == kept_off
    assert "node a is suspect, but jobs still get it: they need 4 of 3 nodes" in nodes.lines()[0]
    assert list(Nodes(nodes.folder, 2, clock=lambda: 2.0).avoided()) == ["a"], "within an allocation of two nodes"


def test_a_node_that_worked_since_is_not_counted_out(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "nodes", total=3, clock=lambda: 100.0)
    nodes.works(["a"], since=5.0)
    assert not nodes.folder.exists(), "without a fault nothing is written"
    for trial in ("t1", "t2"):
        nodes.record(fault(trial, "a", time=10.0))
    nodes.works(["a"], since=9.0)  # began before
    assert list(nodes.avoided()) == ["a"]
    nodes.works(["a"], since=11.0)
    assert nodes.avoided() == {}
    nodes.record(fault("t3", "a", kind=FaultKind.node, time=10.0))
    assert list(nodes.avoided()) == ["a"], "another trial on another device says nothing about a broken one"


def test_a_damaged_file_is_named_and_stops_nothing(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "nodes", total=3, clock=lambda: 2.0)
    nodes.record(fault("t1", "a", kind=FaultKind.node))
    nodes.record(fault("t2", "b", kind=FaultKind.node))
    file = next(nodes.folder.glob("t2-*.json"))
    file.write_text(file.read_text().replace("node", "nods", 1))
    assert list(nodes.avoided()) == ["a"]
    assert file.name in nodes.lines()[-1]


def test_a_name_from_slurm_is_no_path(tmp_path: Path) -> None:
    nodes = Nodes(tmp_path / "nodes", total=3)
    nodes.record(fault("t1", "../x", kind=FaultKind.node))
    nodes.clear("../x")
    assert sorted(os.listdir(tmp_path)) == ["nodes"]
