"""The check of a GPU, run on the CPU, which tells whether the check works and nothing about a GPU."""

import time

import pytest
import torch
from torch import Tensor

from cnnjepa import gpu_check
from cnnjepa.config import Execution
from cnnjepa.gpu_check import Check, check_device, small_config

CPU = torch.device("cpu")


def levels(found: list[gpu_check.Finding]) -> dict[str, str]:
    return {what: level for level, what, _ in found}


def short(**changes: object) -> Check:
    return Check(small_config(CPU, micro_batch_size=8, **changes), CPU, time.monotonic() + 60)


@pytest.mark.slow
def test_a_minute_says_what_was_checked_the_pace_the_bandwidth_and_what_to_change() -> None:
    found = check_device(short().config, 60, CPU)
    assert [what for _, what, _ in found][:3] == ["bandwidth", "exact", "pace"]
    said = {what: text for _, what, text in found}
    assert levels(found)["exact"] == "ok"
    assert "images/s on one CPU (cnn_jepa, resnet_small, tiled, fp32, micro-batch 8, no loader, n = 1)" in said["pace"]
    assert "MB per image computed" in said["pace"]
    assert "of the measured bandwidth" in said["pace"]
    assert "TB/s" in said["bandwidth"]
    assert "change" in said


def test_executions_that_differ_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.encode_tiles

    def wrong(*arguments: object) -> Tensor:
        return right(*arguments) * (1 + 1e-6)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_check, "encode_tiles", wrong)
    check = short()
    gpu_check.exact(check)
    assert levels(check.found) == {"exact": "problem"}
    assert "use encoder.execution=masked" in check.found[0][2]


def test_steps_repeat_and_resume_and_a_step_that_does_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    check = short()
    gpu_check.repeats(check)
    assert levels(check.found) == {"repeats": "ok", "restores": "ok"}
    monkeypatch.setattr(gpu_check.Training, "resumed", lambda self: gpu_check.Training(self.config, self.device))  # it begins again
    check.found.clear()
    gpu_check.repeats(check)
    assert levels(check.found) == {"repeats": "ok", "restores": "problem"}


@pytest.mark.slow
def test_a_run_is_made_stopped_halfway_and_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    check = short()
    gpu_check.runs(check)
    assert levels(check.found) == {"run": "ok", "resumes": "ok"}
    assert "20 steps on digits and their probes, and 20 stopped halfway and resumed" in check.found[0][2]


def test_a_faster_execution_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def paced(check: Check, config: object) -> dict[str, float]:
        masked = config.encoder.execution is Execution.masked  # type: ignore[attr-defined]
        return {"pace": 130.0 if masked else 100.0, "host": 0.95, "peak": 0.0, "bytes": 8e9, "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "pace_of", paced)
    check = short()
    check.bandwidth = 16e9
    gpu_check.pace(check)
    assert "1,000 MB per image computed, 50% of the measured bandwidth" in check.found[0][2].replace("1000", "1,000")
    assert [level for level, what, _ in check.found if what == "change"] == ["warning", "warning"]
    assert "encoder.execution=masked is 1.30 times as fast here, with equal results" in check.found[1][2]
    assert "the host launches for 95% of a step" in check.found[2][2]


def test_an_error_is_a_finding_and_the_other_parts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(check: Check) -> None:
        raise torch.OutOfMemoryError("of a planted kind")

    def failing(check: Check) -> None:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(gpu_check, "SHORT", (broken, failing, gpu_check.bandwidth))
    found = check_device(short().config, 60, CPU)
    assert [level for level, *_ in found] == ["problem", "problem", "ok"]
    assert "try a smaller micro_batch_size" in found[0][2]
    assert "got RuntimeError: a planted fault" in found[1][2]


def test_what_no_time_is_left_for_is_said() -> None:
    found = check_device(short().config, 0, CPU)
    assert {level for level, *_ in found} == {"warning"}
    assert "not checked: the 0 s are over" in found[0][2]


def test_without_cuda_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_check.check_gpu(short().config, 60) == [("not run", "gpu", "this torch is built without CUDA")]
