"""The run folder: what a later claim may write over, what a torn file still tells, and what is never a number."""

import json
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.records import read_metrics, read_probes
from tests.support.tiny import tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.prepare(tiny_config())
    return made


def result(claim: int, cause: str = "") -> RunResult:
    return RunResult(RunStatus.failed, cause, claim=claim)


def test_a_result_gives_way_to_that_of_a_later_claim_alone(folder: RunFolder) -> None:
    assert folder.write_result(result(2, "first"))
    for claim in (1, 2):
        assert not folder.write_result(result(claim, "late"))
        assert folder.result() == result(2, "first")
    assert folder.write_result(result(3, "next"))
    assert folder.result() == result(3, "next")


def test_results_that_are_set_aside_are_kept_by_number_and_others_stay(folder: RunFolder) -> None:
    for claim in (1, 2):
        folder.write_result(result(claim))
        folder.set_aside(RunStatus.completed)
        assert folder.result() == result(claim)
        folder.set_aside(RunStatus.failed)
        assert folder.result() is None
    kept = sorted(folder.path.glob("result.failed-*.json"))
    assert [p.name for p in kept] == ["result.failed-1.json", "result.failed-2.json"]
    assert [json.loads(p.read_text())["claim"] for p in kept] == [1, 2]


def test_records_up_to_the_checkpoint_stay_and_later_ones_and_the_end_go(folder: RunFolder) -> None:
    folder.open_metrics(0)
    for step in range(1, 6):
        folder.record("step", step, {"epoch": step / 5, "loss": 1.0})
    folder.record("final", 5, {"epoch": 1.0})
    folder.close()
    folder.open_metrics(3)
    folder.close()
    assert [(r["kind"], r["step"]) for r in folder.metrics()] == [("step", 1), ("step", 2), ("step", 3)]
    folder.open_metrics(5)
    folder.record("final", 5, {"epoch": 1.0})
    folder.close()
    folder.open_metrics(5)
    folder.close()
    assert [r["kind"] for r in folder.metrics()] == ["step"] * 3


def test_what_is_not_finite_is_recorded_as_missing(folder: RunFolder) -> None:
    folder.open_metrics(0)
    folder.record("step", 1, {"epoch": 0.1, "loss": float("nan"), "norm": float("-inf"), "lr": 0.5, "n": 3})
    folder.close()
    assert folder.metrics() == [{"kind": "step", "step": 1, "epoch": 0.1, "loss": None, "norm": None, "lr": 0.5, "n": 3}]


def test_the_end_of_a_metrics_file_is_read_from_its_first_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": i, "epoch": 0.0}) + "\n" for i in range(10)]
    path.write_text("".join(lines) + '{"kind": "st')
    torn = len('{"kind": "st')
    assert [r["step"] for r in read_metrics(path)] == list(range(10))
    assert [r["step"] for r in read_metrics(path, last_bytes=2 * len(lines[0]) + torn + 1)] == [8, 9]
    assert [r["step"] for r in read_metrics(path, last_bytes=10**6)] == list(range(10))
    assert read_metrics(tmp_path / "none") == []


def test_probes_are_read_on_from_where_the_last_look_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_probes(path) == ({}, 0)
    first = json.dumps({"kind": "step", "step": 5, "epoch": 1.0}) + "\n"
    first += json.dumps({"kind": "probe", "step": 5, "epoch": 1.0, "knn.holdout_top1": 60.0, "linear.holdout_top1": None}) + "\n"
    second = json.dumps({"kind": "probe", "step": 10, "epoch": 2.0, "knn.holdout_top1": 70.0}) + "\n"
    path.write_text(first + second[:20])
    probes, place = read_probes(path)
    assert (probes, place) == ({"1": {"knn.holdout_top1": 60.0}}, len(first))
    path.write_text(first + second)
    assert read_probes(path, place) == ({"2": {"knn.holdout_top1": 70.0}}, len(first + second))
