"""The accounting may have the end of a job a while after it: the closing lines wait for it, and say where it does not come."""

import io
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from jobs.slurm import sacct as records
from sweeps.execution import monitor
from sweeps.report import usage
from sweeps.report.usage import advice_lines, await_records
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.advised import LINES, end, planned


class Late:
    """A sacct that has the end of job 17_0 at its `whole`-th call only, before that `before`; and a clock that only sleep moves."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, before: str, whole: int, status: int = 0) -> None:
        self.now, self.calls = 0.0, folder / "calls"
        folder.mkdir()
        (folder / "before").write_text(before)
        (folder / "whole").write_text("".join(line for line in LINES.splitlines(keepends=True) if line.startswith("17_0")))
        self.calls.write_text("")
        lines = f'echo >> "{self.calls}"\nn=$(wc -l < "{self.calls}")\n'
        lines += f'[ "$n" -ge {whole} ] && exec cat "{folder}/whole"\ncat "{folder}/before" >&{2 if status else 1}\nexit {status}\n'
        for name, script in (("sacct", lines), ("squeue", "")):
            (folder / name).write_text(f"#!/bin/sh\n{script}")
            (folder / name).chmod(0o755)
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setattr(usage, "_RECORD_WITHIN_SECONDS", 5.0)
        patch.setattr(records, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, view: View) -> None:
        await_records(view)

    def lines(self, made: Sweep) -> list[str]:
        """The closing lines of a sweep that has just ended."""
        view = View(made)
        self.wait(view)
        return advice_lines(view)

    @property
    def asked(self) -> int:
        return len(self.calls.read_text().splitlines())


RUNS = "17_0|RUNNING|00:20:00|16:00:00|00:00:00|64|1|256000M||\n17_0.batch|RUNNING|00:20:00||00:00:00|64|1||0|1\n"


@pytest.fixture
def ended(tmp_path: Path) -> Sweep:
    made = planned(tmp_path)
    end(made, made.trials[0], "17_0", seconds=1100.0, peak_memory_mb=9000.0)
    return made


@pytest.mark.parametrize("before", ["", RUNS], ids=["no record", "still running"])
def test_the_closing_lines_wait_for_the_end_of_the_jobs_in_the_accounting(
    before: str, ended: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(tmp_path / "late", monkeypatch, before, whole=3)
    lines = late.lines(ended)
    assert lines[0].startswith(
        "used at most, by 1 completed runs (sacct): time 2 % of 16:00:00, memory 12 GB (5 % of 256), cores 8 % of 64"
    )
    assert not [line for line in lines if "accounting" in line]
    assert (late.asked, late.now) == (3, 2.0)


@pytest.mark.parametrize("before", ["", RUNS], ids=["no record", "still running"])
def test_a_record_that_does_not_come_is_said_with_what_to_type_later(
    before: str, ended: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(tmp_path / "late", monkeypatch, before, whole=99)
    used, missing, *_ = late.lines(ended)
    again = f"python -m sweeps advice {ended.path}"
    assert used.startswith("used at most, by 1 completed runs (counters): time ")
    assert missing == f"not yet in the accounting: the end of 1 of 1 jobs; the trainer's own counters are used instead; later: {again}"
    assert (late.asked, late.now) == (6, 5.0)
    assert advice_lines(View(ended))[1] == missing  # who asks for it later hears it as well, and waits for nothing
    assert (late.asked, late.now) == (7, 5.0)


def test_an_accounting_that_does_not_answer_is_said_and_one_that_there_is_none_of_costs_no_time(
    ended: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Late(tmp_path / "silent", monkeypatch, "sacct: error: Connection refused", whole=99, status=1)
    missing = silent.lines(ended)[1]
    assert missing == f"sacct does not answer, so these are the trainer's own counters; later: python -m sweeps advice {ended.path}"
    assert silent.now == 5.0
    disabled = Late(tmp_path / "disabled", monkeypatch, "Slurm accounting storage is disabled", whole=99, status=1)
    assert [line for line in disabled.lines(ended) if "sacct" in line or "accounting" in line] == []
    assert (disabled.asked, disabled.now) == (1, 0.0)


def test_nobody_waits_for_the_record_of_a_job_that_ended_long_ago(ended: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time() - 7200
    os.utime(ended.trial_dir(ended.trials[0]) / "result.json", (before, before))
    late = Late(tmp_path / "late", monkeypatch, "", whole=99)
    assert late.lines(ended)[1] == "sacct has no record of 1 of 1 jobs; the trainer's own counters are used instead"
    assert (late.asked, late.now) == (1, 0.0)


def test_a_sweeps_command_waits_for_the_records_before_it_makes_its_page(
    ended: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, asked_before_the_page = Late(tmp_path / "late", monkeypatch, RUNS, whole=3), []
    monkeypatch.setattr(monitor, "await_records", late.wait)
    monkeypatch.setattr(monitor, "rebuild", lambda _: asked_before_the_page.append(late.asked) or "")
    monkeypatch.setattr(monitor.tables, "write_all", lambda _: [])
    said = io.StringIO()
    monitor.conclude(View(ended), Console(file=said, width=200))
    assert "(sacct): time 2 % of 16:00:00" in said.getvalue()
    assert asked_before_the_page == [3]
