"""A sweep folder that was moved goes on; a copy of one takes nothing of its original for its own, and changes nothing there."""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.files import BY_LINKS, PLACE, sealed_json
from jobs.config import compose_job
from jobs.probe import Request
from jobs.slurm import queue as slurm
from jobs.slurm.queue import Element
from sweeps.cli.cancel import cancel
from sweeps.execution import slurm_array, submitting
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims, place
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.history import commands, note_command
from sweeps.state.place import Place, place_of, record_place
from sweeps.state.submission import Submission, job_prefix, last_number, moved_line
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.no_links import refuse_links

CLUSTER = compose_job(["cluster=test_cluster"]).cluster


class Jobs:
    """A Slurm that lists some jobs under a name."""

    silent = False

    def __init__(self, name: str = "", **states: str) -> None:
        self.listed = [Element(job.strip("j"), state, 0, "None", "gpu01", name) for job, state in states.items()]

    def named(self, prefix: str) -> list[Element]:
        return [e for e in self.listed if e.name.startswith(prefix)]

    def state(self, job: str, name: str = "") -> str:
        return next((e.state for e in self.listed if e.id == job), slurm.GONE)

    def restarts(self, job: str) -> int:
        return 0

    def is_elsewhere(self, cluster: str) -> bool:
        return False

    def in_doubt(self, arrays: object) -> set[str]:
        return set()

    def look_again(self) -> None:
        """Nothing is remembered."""

    def expect(self, name: str) -> None:
        """Nothing is remembered."""

    def elements(self) -> dict[str, Element]:
        return {e.id: e for e in self.listed}


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a folder, with their contents and times."""
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def begun(path: Path, job: str | None = "7") -> Sweep:
    """A sweep of three trials, of which the first two were claimed by jobs of one submission; `job` is None if its number was lost."""
    sweep = Sweep(path, "x", "?", ScaleName.smoke, "o", [], {}, [Trial(i, f"s{i}", 42, {"epochs": 4}, f"trial{i}") for i in range(3)])
    sweep.write()
    code = path / "code" / "0123456789ab"
    made = Submission(path, 1, f"{job_prefix(sweep)}0001", 3, 3, [], CLUSTER, str(code), Process.me(), 5.0)
    assert made.create()
    if job:
        made.write_job(job)
    for number in (0, 1):
        start = SlurmStart("mini", f"7_{number}", 0, "gpu01", 4, str(path / "log" / f"7_{number}.log"), str(code))
        assert claims.claim(sweep.trial_dir(sweep.trials[number]), 1, start.driver, 0, start)
    return sweep


def states(sweep: Sweep, jobs: Jobs) -> list[str]:
    return [state.name for state in View(sweep, queue=jobs).states().values()]  # type: ignore[arg-type]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The jobs that were cancelled in Slurm."""
    found: list[str] = []
    monkeypatch.setattr(slurm, "cancel", found.extend)
    return found


def test_a_recorded_path_is_the_folder_another_one_or_gone(tmp_path: Path) -> None:
    folder, other = tmp_path / "sweep", tmp_path / "other"
    for made in (folder, other):
        made.mkdir()
    (tmp_path / "link").symlink_to(folder)
    assert [place_of(p, folder) for p in (folder, tmp_path / "link")] == [Place.here] * 2
    assert place_of(other, folder) is Place.elsewhere
    (other / "file").touch()
    assert [place_of(p, folder) for p in (tmp_path / "away", other / "file" / "sweep")] == [Place.gone] * 2


def test_what_waits_for_a_moved_sweep_is_free_to_go_on_and_its_files_are_found(tmp_path: Path, ended: list[str]) -> None:
    begun(tmp_path / "runs" / "x")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    sweep = Sweep.load(tmp_path / "elsewhere" / "x")
    for state in ("PENDING", "CANCELLED", "NODE_FAIL", "COMPLETED"):
        assert states(sweep, Jobs("any", j7_0=state, j7_1=state)) == ["interrupted", "interrupted", "waiting"]
    jobs = Jobs("any", j7_0="RUNNING")  # the other one is not listed
    assert states(sweep, jobs) == [
        "running",
        "running",
        "waiting",
    ]  # fresh heartbeats: the path may be gone here alone
    for number in (0, 1):
        os.utime(sweep.trial_dir(sweep.trials[number]) / "claim" / "000001.json", (5, 5))
    assert states(sweep, jobs) == ["interrupted", "interrupted", "waiting"]
    (made,) = Submission.all_of(sweep)
    assert (made.job, made.code, made.log_folder) == ("7", str(sweep.path / "code" / "0123456789ab"), sweep.path / "log")
    past = claims.history(sweep.trial_dir(sweep.trials[0]))
    assert past[0].slurm is not None
    assert past[0].slurm.output(sweep.path) == sweep.path / "log" / "7_0.log"
    assert cancel(View(sweep, queue=jobs), []) == "3 trials cancelled, 0 jobs ended; run the sweep's command to resume them"  # type: ignore[arg-type]
    assert ended == []


@pytest.mark.parametrize("job", ["7", None])
@pytest.mark.parametrize("copied", [shutil.copytree, lambda a, b: shutil.copytree(a, b, copy_function=os.link)], ids=["cp -a", "cp -al"])
def test_a_copy_is_free_while_its_original_runs_and_changes_nothing_there(
    tmp_path: Path, ended: list[str], monkeypatch: pytest.MonkeyPatch, job: str | None, copied: Callable[[Path, Path], object]
) -> None:
    first = begun(tmp_path / "runs" / "x", job)
    jobs = Jobs(f"{job_prefix(first)}0001", j7_0="RUNNING", j7_1="PENDING", j7_2="PENDING")
    copied(first.path, tmp_path / "copy")
    before = everything(first.path)
    sweep = Sweep.load(tmp_path / "copy")
    assert states(first, jobs) == ["running", "requeued", "waiting"]
    assert states(sweep, jobs) == ["interrupted", "interrupted", "waiting"]
    assert moved_line(sweep, jobs) == ""  # type: ignore[arg-type]
    engine = SlurmEngine(sweep, CLUSTER, tmp_path / "code", jobs)  # type: ignore[arg-type]
    monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: None)
    monkeypatch.setattr(submitting, "submit", lambda profile, array: "9")
    engine.settle(lambda said: pytest.fail(said))
    missing = engine.missing(View(sweep, queue=jobs))  # type: ignore[arg-type]
    assert (missing, [s.job for s in engine.submit(missing)], last_number(sweep)) == (3, ["9"], 2)
    assert cancel(View(sweep, queue=jobs), []).startswith("3 trials cancelled, 0 jobs ended")  # type: ignore[arg-type]
    assert ended == []
    sweep.write()
    assert everything(first.path) == before
    assert states(first, jobs) == ["running", "requeued", "waiting"]


def test_one_trial_of_a_copy_can_be_cancelled(tmp_path: Path, ended: list[str]) -> None:
    first = begun(tmp_path / "x")
    jobs = Jobs(f"{job_prefix(first)}0001", j7_0="RUNNING", j7_1="RUNNING", j7_2="PENDING")
    shutil.copytree(first.path, tmp_path / "copy")
    sweep = Sweep.load(tmp_path / "copy")
    cancel(View(sweep, queue=jobs), sweep.trials[:1])  # type: ignore[arg-type]
    assert (ended, states(first, jobs), states(sweep, jobs)[0]) == ([], ["running", "running", "waiting"], "cancelled")


def test_a_sweep_under_another_name_is_the_same(tmp_path: Path, ended: list[str]) -> None:
    first = begun(tmp_path / "x")
    (tmp_path / "link").symlink_to(first.path)
    sweep = Sweep.load(tmp_path / "link")
    jobs = Jobs("any", j7_0="RUNNING", j7_1="PENDING")
    assert states(sweep, jobs) == ["running", "requeued", "waiting"]
    cancel(View(sweep, queue=jobs), sweep.trials[:1])  # type: ignore[arg-type]
    assert ended == ["7_0"]


@pytest.mark.parametrize(("gone", "live", "line"), [(True, True, True), (True, False, False), (False, True, False)])
def test_jobs_that_wait_for_a_sweep_that_was_moved_are_named(tmp_path: Path, gone: bool, live: bool, line: bool) -> None:
    first = begun(tmp_path / "x")
    jobs = Jobs(f"{job_prefix(first)}0001", j7_0="COMPLETED", j7_1="PENDING" if live else "FAILED", j7_2="PENDING" if live else "COMPLETED")
    (shutil.move if gone else shutil.copytree)(first.path, tmp_path / "away")
    said = moved_line(Sweep.load(tmp_path / "away"), jobs)  # type: ignore[arg-type]
    asked = f"2 jobs were submitted when this folder was {first.path}, and cannot find it; to end them: scancel 7"
    assert said == (asked if line else "")


def test_a_folder_records_once_how_files_are_created_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    record_place(folder)
    first = everything(folder)[PLACE]
    record_place(folder)
    assert everything(folder) == {PLACE: first}
    refuse_links(monkeypatch)
    with pytest.raises(ValueError, match=r"^[^\n]*x must be on a mount with hard links, .*; got one without: use the mount"):
        record_place(folder)
    folder = folder.rename(tmp_path / "moved")
    record_place(folder)  # to another file system: its claims are made in another way from now on
    assert b'"exclusive": "folders"' in (folder / PLACE).read_bytes()
    monkeypatch.undo()
    before = everything(folder)
    record_place(folder)  # another machine could make links, and does not
    assert everything(folder) == before


def test_of_two_commands_that_record_a_new_folder_at_once_the_second_obeys_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has no hard links, and sees the record only when it is about to create it."""
    honest = place.create_by_folder

    def overtaken(path: Path, data: str) -> bool:
        assert honest(path, sealed_json({"path": str(tmp_path), "exclusive": BY_LINKS}))
        return honest(path, data)

    monkeypatch.setattr(place, "create_by_folder", overtaken)
    refuse_links(monkeypatch)
    with pytest.raises(ValueError, match="must be on a mount with hard links"):
        record_place(tmp_path)


def test_a_copy_made_of_hard_links_notes_its_commands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, copy = tmp_path / "first", tmp_path / "copy"
    monkeypatch.setattr(sys, "argv", ["sweep.py", "epochs=1"])
    note_command(first)
    before = everything(first)
    shutil.copytree(first, copy, copy_function=os.link)
    for words in (["epochs=2"], ["epochs=3"]):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
        note_command(copy)
    assert everything(first) == before
    assert [c["command"] for c in commands(copy)] == [["python", "sweep.py", f"epochs={n}"] for n in (1, 2, 3)]


def test_a_request_for_scores_is_moved_with_its_runs(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "trials" / name for name in ("1", "2")]
    for run in runs:
        run.mkdir(parents=True)
    file = tmp_path / "a" / "scores" / "request.json"
    file.parent.mkdir()
    made = Request(runs, {}, 1, "cpu", "")
    made.write(file)
    assert Request.load(file) == made
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = Request.load(tmp_path / "b" / "scores" / "request.json")
    assert moved == replace(made, runs=[tmp_path / "b" / "trials" / name for name in ("1", "2")])


def test_a_local_owner_is_judged_by_its_process_wherever_the_folder_is(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "x", "x", "?", ScaleName.smoke, "o", [], {}, [Trial(0, "s", 42, {"epochs": 4}, "t")])
    sweep.write()
    assert claims.claim(sweep.trial_dir(sweep.trials[0]), 1, "d", 0)
    shutil.move(sweep.path, tmp_path / "y")
    assert View(Sweep.load(tmp_path / "y")).states() == {"t": TrialState.running}
