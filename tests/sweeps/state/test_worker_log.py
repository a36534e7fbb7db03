from pathlib import Path

from sweeps.state.logs import log_tail


def test_a_cause_is_who_was_killed_and_what_went_wrong_and_not_what_that_set_off(tmp_path: Path) -> None:
    log = tmp_path / "7_3.log"
    assert log_tail(log) == ""
    lines = [
        "Traceback (most recent call last):",
        '  File "train.py", line 1, in train',
        "RuntimeError: Connection reset by peer",
        "srun: error: gpu01: task 1: Killed",
        *["[rank2]:   a line of a traceback"] * 500,
        "SIGTERM: saving a checkpoint, then stopping",
        "srun: error: gpu01: tasks 0,2: Terminated",
        "2026-11-23 11:58:01 supervisor: status 137: a rank died, starting again in place",
    ]
    log.write_text("\n".join(lines))
    assert log_tail(log) == "srun: error: gpu01: task 1: Killed | RuntimeError: Connection reset by peer"
    log.write_text("ModuleNotFoundError: No module named 'torch'\nsrun: error: gpu01: tasks 0-3: Exited with exit code 1\n")
    assert log_tail(log) == "ModuleNotFoundError: No module named 'torch'"
    log.write_text("only this\n")
    assert log_tail(log) == "only this"
