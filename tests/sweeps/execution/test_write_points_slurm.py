"""The submitting command, and the workers in its jobs, killed -9 at each of their write points: workers and rows are there once.

Slurm's commands are stand-ins that keep a queue in a folder; tests/sweeps/execution/test_slurm_faults.py strikes on a real Slurm.
"""

import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import preflight, snapshot
from jobs.slurm import queue
from jobs.task import task_of
from sweeps.cli import submit
from sweeps.execution import slurm_array, worker_main
from sweeps.state.submission import Submission
from tests.support.fault_target import folder, make_quick, planned, repeated, rows, what_it_came_to, work
from tests.support.sample import drawn, seeded
from tests.support.trivial import trivial_job
from tests.support.write_points import end_of, points_of, run, start

QUEUE = "FAKE_QUEUE"
COMMANDS = {
    "sbatch": """case "$*" in *--test-only*) exit 0;; esac
for script; do :; done
n=100; until mkdir "$FAKE_QUEUE/$n" 2>/dev/null; do n=$((n + 1)); done
sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script" > "$FAKE_QUEUE/$n/last"
sed -n 's/^#SBATCH --job-name=//p' "$script" > "$FAKE_QUEUE/$n/name"
echo "Submitted batch job $n"
""",
    "squeue": """for job in "$FAKE_QUEUE"/*/name; do
    [ -e "$job" ] || continue
    read -r name < "$job"; folder=${job%/name}; read -r last < "$folder/last"
    i=0; while [ $i -le "$last" ]; do
        state=PENDING; [ ! -e "$folder/$i" ] || read -r state < "$folder/$i"
        echo "${folder##*/}_$i|$state|0|None|gpu01|$name|"
        i=$((i + 1))
    done
done
""",
    "scontrol": """case "$*" in *config*) echo "MaxArraySize = 1001";; *) echo "PartitionName=gpu MaxTime=UNLIMITED State=UP";; esac""",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",  # else a command waits for the records of its jobs
    "scancel": "true",
    "sinfo": "true",
    "sacctmgr": "true",
}


@pytest.fixture(autouse=True)
def _slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_quick(monkeypatch)
    planned("sweep", "test_cluster")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "fake")
    monkeypatch.setattr(slurm_array, "_DEAD_WRITER_SECONDS", 0.0)
    monkeypatch.setattr(queue, "EMPTY_SECONDS", 0.0)  # this squeue's answers are never wrong
    monkeypatch.setattr(queue, "SECOND_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(snapshot, "_PARTS", ("pyproject.toml",))
    monkeypatch.setattr(submit, "array_limit", lambda: 1001)
    monkeypatch.setattr(preflight, "checked_data", lambda _: [])
    monkeypatch.setattr(task_of({}), "bytes_of_a_run", lambda _: 1)
    for module in ("jobs.run", "sweeps.execution.worker_ranks"):  # which another test may have imported
        monkeypatch.setattr(f"{module}.run_job", trivial_job)


def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "runs") -> Path:
    runs = tmp_path / name
    shutil.rmtree(runs, ignore_errors=True)
    (runs / "queue").mkdir(parents=True)
    monkeypatch.setenv(QUEUE, str(runs / "queue"))
    return runs


def elements(runs: Path) -> list[tuple[str, int]]:
    """(array, element) of all that was ever queued."""
    return [(job.name, i) for job in sorted((runs / "queue").iterdir()) for i in range(int((job / "last").read_text()) + 1)]


def run_element(runs: Path, array: str, element: int, kill_at: int, said: Path) -> int:
    """One element's rank, in the environment that Slurm gives it; returns its exit status."""
    state = runs / "queue" / array / str(element)
    name = (state.parent / "name").read_text().strip()
    (submission,) = [s for s in map(Submission.load, (folder("sweep", runs) / "submissions").glob("[0-9]*.json")) if s.name == name]
    state.write_text("RUNNING\n")

    def one() -> int:
        os.environ |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": str(element), "SLURM_JOB_ID": f"9{element}"}
        os.environ |= {"SLURM_JOB_NODELIST": "gpu01", "SLURM_RESTART_COUNT": "0"}
        return worker_main.run_rank(submission.path, lambda: False)  # type: ignore[arg-type]

    status = run(one, runs, kill_at, said)
    if status == 0:
        state.write_text("COMPLETED\n")
    return status


def run_jobs(runs: Path, said: Path, kill_at: int = 0) -> int:
    """All elements, one after the other; the first is killed at that point and, as the supervisor has it, started again in place.

    Returns how many died.
    """
    died = 0
    for array, element in elements(runs):
        while run_element(runs, array, element, kill_at, said) != 0:
            kill_at, died = 0, died + 1
    return died


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runs, said = in_a_new_folder(tmp_path, monkeypatch, "undisturbed"), tmp_path / "said"
    assert run(work("sweep", runs, "test_cluster"), runs, 0, said) == 0
    assert len(elements(runs)) == 2
    run_jobs(runs, tmp_path / "said-jobs")
    assert run(work("sweep", runs, "test_cluster"), runs, 0, tmp_path / "said-end") == 0
    assert len(rows("sweep", runs)) == 2
    return runs


def submit_killed_at(wanted: Sequence[int], points: int, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nth, point in enumerate(wanted):
        runs, said = in_a_new_folder(tmp_path, monkeypatch), tmp_path / f"said-{point}"
        command = work("sweep", runs, "test_cluster")
        assert run(command, runs, point, said) == -signal.SIGKILL, f"point {point} of {points}"
        assert run(command, runs, 0, said) == 0
        assert len(elements(runs)) == 2, f"killed at point {point} of {points}: {said.read_text()}"
        assert run(command, runs, 0, said) == 0
        assert len(elements(runs)) == 2
        if nth % 5 and point < points - 10:  # the jobs find the same folder
            continue
        run_jobs(runs, said)
        assert run(command, runs, 0, said) == 0
        assert what_it_came_to("sweep", runs) == expected, f"killed at point {point} of {points}"
        assert repeated(runs) == 0


@pytest.mark.slow
@seeded
def test_the_submitting_command_is_killed_at_some_write_points(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    points, expected = points_of(tmp_path / "said"), what_it_came_to("sweep", undisturbed)
    some = drawn(range(1, points + 1), 6, "submitting command", seed)
    submit_killed_at(some, points, expected, tmp_path, monkeypatch)


@pytest.mark.nightly
def test_the_submitting_command_is_killed_at_each_write_point(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, expected = points_of(tmp_path / "said"), what_it_came_to("sweep", undisturbed)
    assert points > 40
    submit_killed_at(range(1, points + 1), points, expected, tmp_path, monkeypatch)


def both_submit(wanted: Sequence[int], points: int, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for point in wanted:
        runs, said = in_a_new_folder(tmp_path, monkeypatch), tmp_path / f"said-{point}"
        command = work("sweep", runs, "test_cluster")
        first, second = map(end_of, [start(command, runs, kill_at, said) for kill_at in (point, 0)])
        assert first in (0, -signal.SIGKILL), said.read_text()
        assert second == 0, said.read_text()
        assert len(elements(runs)) == 2, f"killed at point {point} of {points}: {said.read_text()}"
        run_jobs(runs, said)
        assert run(command, runs, 0, said) == 0
        assert what_it_came_to("sweep", runs) == expected, f"killed at point {point} of {points}"


@pytest.mark.slow
@seeded
def test_of_two_submitting_commands_at_once_one_is_killed(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    points, expected = points_of(tmp_path / "said"), what_it_came_to("sweep", undisturbed)
    both_submit(drawn(range(2, points + 1), 4, "two commands", seed), points, expected, tmp_path, monkeypatch)


@pytest.mark.nightly
def test_of_two_submitting_commands_at_once_one_is_killed_wherever_it_is(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, expected = points_of(tmp_path / "said"), what_it_came_to("sweep", undisturbed)
    both_submit(range(1, points + 1), points, expected, tmp_path, monkeypatch)


def rank_killed_at(wanted: Sequence[int], points: int, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = in_a_new_folder(tmp_path, monkeypatch)
    assert run(work("sweep", submitted, "test_cluster"), submitted, 0, tmp_path / "said-submit") == 0
    kept = tmp_path / "kept"
    shutil.copytree(submitted, kept)
    for point in wanted:
        runs, said = in_a_new_folder(tmp_path, monkeypatch), tmp_path / f"said-{point}"
        shutil.copytree(kept, runs, dirs_exist_ok=True)
        assert run_jobs(runs, said, kill_at=point) == 1, f"point {point} of {points}"
        assert run(work("sweep", runs, "test_cluster"), runs, 0, said) == 0
        assert len(elements(runs)) == 2
        assert what_it_came_to("sweep", runs) == expected, f"killed at point {point} of {points}"
        assert repeated(runs) <= 1


@pytest.mark.slow
@seeded
def test_a_rank_is_killed_at_some_of_its_write_points(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    points, expected = points_of(tmp_path / "said-jobs"), what_it_came_to("sweep", undisturbed)
    rank_killed_at(drawn(range(1, points + 1), 6, "rank", seed), points, expected, tmp_path, monkeypatch)


@pytest.mark.nightly
def test_a_rank_is_killed_at_each_of_its_write_points(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points, expected = points_of(tmp_path / "said-jobs"), what_it_came_to("sweep", undisturbed)
    assert points > 40
    rank_killed_at(range(1, points + 1), points, expected, tmp_path, monkeypatch)
