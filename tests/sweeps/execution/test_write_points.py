"""Killed -9 at each of its write points in turn, whatever keeps a sweep ends with the same rows, once each."""

import functools
import itertools
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder
from cnnjepa.run.records import read_metrics, read_probes
from sweeps.cli import local
from sweeps.execution import worker
from sweeps.report import optuna_study
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.fault_target import SPECS, InProcess, folder, make_quick, repeated, rows, what_it_came_to, work
from tests.support.sample import drawn, seeded
from tests.support.trivial import STEPS
from tests.support.write_points import end_of, points_of, run, start


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture(params=SPECS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What each command comes to when nothing disturbs it, made once; no test changes it."""

    @functools.cache
    def made(name: str) -> Path:
        runs = tmp_path_factory.mktemp("undisturbed") / "runs"
        runs.mkdir()
        assert run(work(name, runs), runs, 0, said_of(runs)) == 0
        return runs

    return made


@pytest.fixture
def undisturbed(name: str, ended: Callable[[str], Path]) -> Path:
    return ended(name)


def said_of(runs: Path) -> Path:
    """What its command has printed."""
    return runs.with_name("said")


@pytest.mark.slow
@seeded
def test_the_command_is_killed_at_some_of_its_write_points_and_run_again(seed: str, name: str, undisturbed: Path, tmp_path: Path) -> None:
    kill_at_points(name, undisturbed, tmp_path, lambda points: drawn(points, 4, name, seed))


@pytest.mark.nightly
def test_the_command_is_killed_at_each_write_point_and_run_again(name: str, undisturbed: Path, tmp_path: Path) -> None:
    kill_at_points(name, undisturbed, tmp_path, lambda points: points)


def kill_at_points(name: str, undisturbed: Path, tmp_path: Path, chosen: Callable[[range], Iterable[int]]) -> None:
    points, expected = points_of(said_of(undisturbed)), what_it_came_to(name, undisturbed)
    assert points > 100
    for point in chosen(range(1, points + 1)):
        runs, said = tmp_path / "runs", tmp_path / f"said-{point}"
        runs.mkdir()
        assert run(work(name, runs), runs, point, said) == -signal.SIGKILL, f"point {point} of {points}"
        assert run(work(name, runs), runs, 0, said) == 0
        assert what_it_came_to(name, runs) == expected, f"killed at point {point} of {points}"
        assert repeated(runs) <= 1, f"killed at point {point} of {points}"
        shutil.rmtree(runs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "later"),
    [("sweep", 4), pytest.param("sweep", 1, marks=pytest.mark.nightly), pytest.param("search", 1, marks=pytest.mark.nightly)],
)
def test_each_start_is_killed_some_write_points_later_than_the_last(name: str, later: int, undisturbed: Path, tmp_path: Path) -> None:
    """Until a start ends by itself: each one gains something on the one before, and none does over what stood already."""
    runs, point = tmp_path / "runs", 1
    runs.mkdir()
    while run(work(name, runs), runs, point, tmp_path / "said-again") == -signal.SIGKILL:
        point += later
        assert point < 200
    assert point > 10
    assert what_it_came_to(name, runs) == what_it_came_to(name, undisturbed)
    owners = [claims.history(d) for d in (folder(name, runs) / "trials").iterdir()]
    assert max(map(len, owners)) > (3 if later == 1 else 1)
    assert [[c.attempt for c in past] for past in owners] == [list(range(1, len(past) + 1)) for past in owners]


@pytest.mark.slow
@pytest.mark.parametrize("every", [70, pytest.param(7, marks=pytest.mark.nightly)])
def test_of_two_commands_at_once_one_is_killed(every: int, name: str, undisturbed: Path, tmp_path: Path) -> None:
    """At some of its write points; the other takes over what it leaves, and both show the same table when run again."""
    points, expected = points_of(said_of(undisturbed)), what_it_came_to(name, undisturbed)
    for point in range(1, points + 1, every):
        runs, said = tmp_path / "runs", tmp_path / f"said-{point}"
        runs.mkdir()
        pair = [start(work(name, runs), runs, kill_at, said) for kill_at in (point, 0)]
        first, second = map(end_of, pair)
        # Where the other one is faster the first has less to write, and may end by itself.
        assert first in (0, -signal.SIGKILL), said.read_text()
        assert second == 0, said.read_text()
        found = what_it_came_to(name, runs)
        if name == "search":  # of two workers that choose at once, either may be first
            assert len(rows(name, runs)) == len(set(rows(name, runs))) == len(rows(name, undisturbed))
        else:
            assert found == expected, f"killed at point {point} of {points}"
        assert repeated(runs) <= 1, f"killed at point {point} of {points}"
        shutil.rmtree(runs)


class Dying(InProcess):
    """Each worker is a process, as Tune has it, and one that dies is placed again: the first of all at write point `kill_at`."""

    kill_at = 0

    def place(self, workers: int, silent: frozenset[Path]) -> list[str]:
        driver = Process.me().driver
        for _ in range(workers):
            while True:
                said = self.sweep.path.parent / "worker"

                def one() -> int:
                    worker.run_worker(self.sweep, self.cluster, driver, lambda: False, silent)
                    return 0

                if run(one, self.sweep.path.parent, type(self).kill_at, said) == 0:
                    break
                type(self).kill_at = 0
                (self.sweep.path.parent / "killed").touch()
        return []


WORKERS = pytest.mark.parametrize("name", ["sweep"])  # what a search's worker writes beside is written under the command's kills


@pytest.mark.slow
@seeded
@WORKERS
def test_a_worker_is_killed_at_some_of_its_write_points_and_its_driver_goes_on(
    seed: str, name: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = drawn(range(1, 41), 4, "worker", seed)
    assert kill_a_worker_at_points(name, undisturbed, tmp_path, monkeypatch, points) == points[-1]


@pytest.mark.nightly
@WORKERS
def test_a_worker_is_killed_at_each_of_its_write_points_and_its_driver_goes_on(
    name: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kill_a_worker_at_points(name, undisturbed, tmp_path, monkeypatch, itertools.count(1)) > 40


def kill_a_worker_at_points(name: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Iterable[int]) -> int:
    """Return the last point at which the first worker was killed; a worker that ends before it comes to its point ends the loop."""
    monkeypatch.setattr(local, "LocalEngine", Dying)
    expected, killed_at = what_it_came_to(name, undisturbed), 0
    for point in chosen:
        runs, said = tmp_path / "runs", tmp_path / f"said-{point}"
        runs.mkdir()
        monkeypatch.setattr(Dying, "kill_at", point)
        assert run(work(name, runs), runs, 0, said) == 0
        assert what_it_came_to(name, runs) == expected, f"killed at point {point}"
        assert repeated(runs) <= 1, f"killed at point {point}"
        killed = (runs / "killed").exists()
        shutil.rmtree(runs)
        if not killed:
            break
        killed_at = point
    return killed_at


@pytest.mark.slow
def test_a_torn_last_line_is_no_record_and_the_run_goes_on_without_it(name: str, undisturbed: Path, tmp_path: Path) -> None:
    """At each byte of it, and with what a power cut may leave instead."""
    trial = next((folder(name, undisturbed) / "trials").iterdir())
    whole = (trial / "metrics.jsonl").read_bytes()
    records, torn = read_metrics(trial / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    ends = [whole[:end] for end in range(last, len(whole))]
    ends += [
        whole[:last] + rest for rest in (b"\0" * 50, b"\xff\n", b'{"kind": "probe"}{"kind": "probe"}\n', b"\n", b"7\n", b"[]\n", b"{}\n")
    ]
    for data in ends:
        torn.write_bytes(data)
        assert read_metrics(torn) == records[:-1], data[last:]
        assert read_probes(torn)[0] == RunFolder(trial).probes(), data[last:]
        assert read_metrics(torn, last_bytes=len(data) - 5) == records[1:-1], data[last:]
    run_folder = RunFolder(tmp_path)
    run_folder.open_metrics(STEPS)
    run_folder.record("final", STEPS, {"epoch": 2.0})
    run_folder.close()
    assert run_folder.metrics() == [*records[:-1], {"kind": "final", "step": STEPS, "epoch": 2.0}]


@pytest.mark.slow
def test_the_mirror_is_killed_at_each_write_point_deleted_and_made_again(name: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    assert run(work(name, runs), runs, 0, tmp_path / "said") == 0
    path, expected = folder(name, runs), what_it_came_to(name, runs)

    def mirror() -> int:
        return 0 if optuna_study.mirror(View(Sweep.load(path))).exists() else 1

    said, point = tmp_path / "said-mirror", 1
    while run(mirror, path, point, said) == -signal.SIGKILL:
        point += 1
    assert point == 5
    assert [p.name for p in path.iterdir() if "optuna" in p.name and p.suffix != ".tmp"] == ["optuna.journal"]
    (path / "optuna.journal").unlink()
    assert run(work(name, runs), runs, 0, said) == 0  # it is never read back
    assert what_it_came_to(name, runs) == expected
    assert run(mirror, path, 0, said) == 0
    assert (path / "optuna.journal").exists()
