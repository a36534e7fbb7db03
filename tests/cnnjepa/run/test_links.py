"""Where a file system has no hard links, a file is still created by exactly one process, whole, and readers find the newest attempt's."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from cnnjepa.run import checkpoint, files
from cnnjepa.run.attempts import newest, publish
from cnnjepa.run.files import (
    BY_FOLDERS,
    BY_LINKS,
    PLACE,
    create_by_folder,
    create_exclusive,
    links_work,
    remove_partial,
    sealed_json,
    way_of,
)
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.losses import LossCurve
from tests.support.no_links import exfat, refuse_links

ROUNDS, PROCESSES = 300, 4
NO_LINKS = [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture(params=["any file system", pytest.param("exFAT", marks=pytest.mark.nightly)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "exFAT":
        with exfat(tmp_path) as root:
            yield root
    else:
        yield tmp_path


def race(folder: Path, number: int, start: Barrier, said: "Queue[tuple[int, list[int]]]") -> None:
    won = []
    for round_number in range(ROUNDS):
        start.wait(60)
        if create_by_folder(folder / f"{round_number:06d}.json", f"by {number}"):
            won.append(round_number)
    said.put((number, won))


def test_each_of_300_names_has_one_winner_whose_content_it_holds(folder: Path) -> None:
    forked = multiprocessing.get_context("fork")
    start, said = forked.Barrier(PROCESSES), forked.Queue()
    racing = [forked.Process(target=race, args=(folder, number, start, said)) for number in range(PROCESSES)]
    for process in racing:
        process.start()
    won = dict(said.get(timeout=120) for _ in racing)
    for process in racing:
        process.join(60)
    winner = {round_number: number for number, rounds in won.items() for round_number in rounds}
    assert sum(map(len, won.values())) == len(winner) == ROUNDS
    assert [(folder / f"{n:06d}.json").read_text() for n in range(ROUNDS)] == [f"by {winner[n]}" for n in range(ROUNDS)]
    assert not [name for name in names(folder) if name.startswith(".")]


def killed_before(call: str, at: int, create: Callable[[], object]) -> None:
    """Create in a process that is killed -9 just before its call number `at` of a function of os."""
    child = os.fork()
    if child == 0:
        honest, calls = getattr(os, call), []

        def counted(*arguments: object, **more: object) -> object:
            calls.append(arguments)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*arguments, **more)

        setattr(os, call, counted)
        create()
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("call", "at", "is_finished"), [("rename", 1, False), ("rename", 2, True), ("fsync", 2, True), ("fsync", 1, False)]
)
def test_a_holder_that_is_killed_blocks_nobody_and_its_content_is_whole_or_absent(
    tmp_path: Path, call: str, at: int, is_finished: bool
) -> None:
    target = tmp_path / "000001.json"
    killed_before(call, at, lambda: create_by_folder(target, "the dead one's"))
    assert create_by_folder(target, "ours") is not is_finished
    assert target.read_text() == ("the dead one's" if is_finished else "ours")
    assert not create_by_folder(target, "too late")
    remove_partial(tmp_path)
    assert names(tmp_path) == ["000001.json"]


def test_a_holder_that_finds_the_name_taken_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look is too early: between it and the renaming of the folder, another process has created the file and is gone."""
    target, looks, honest = tmp_path / "a.json", [], files._is_listed

    def late(path: Path) -> bool:
        looks.append(path)
        if len(looks) == 1:
            seen = honest(path)
            target.write_text("the rival's")
            return seen
        return honest(path)

    monkeypatch.setattr(files, "_is_listed", late)
    assert not create_by_folder(target, "ours")
    assert (target.read_text(), names(tmp_path)) == ("the rival's", ["a.json"])


def test_who_finishes_for_a_holder_and_comes_late_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has looked: no file is there yet. Then the holder finishes, and the next one holds the name, with another content."""
    target, taking, honest = tmp_path / "a.json", tmp_path / ".a.json.taking", files._is_listed
    taking.mkdir()
    (taking / "first").write_text("the first one's")

    def overtaken(path: Path) -> bool:
        seen = honest(path)
        if (taking / "first").exists():
            os.rename(taking / "first", target)
            (taking / "second").write_text("the second one's")
        return seen

    monkeypatch.setattr(files, "_is_listed", overtaken)
    files._finish(taking, target)
    assert target.read_text() == "the first one's"
    assert names(taking) == ["second"]


@pytest.mark.parametrize("number", NO_LINKS)
def test_without_a_record_the_way_is_what_the_file_system_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    assert links_work(tmp_path)
    refuse_links(monkeypatch, number)
    assert not links_work(tmp_path)
    assert create_exclusive(tmp_path / "a", "first")
    assert not create_exclusive(tmp_path / "a", "second")
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "first")


def test_any_other_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch, errno.EIO)
    for attempt in (links_work, lambda folder: create_exclusive(folder / "a", "x"), lambda folder: RunFolder(folder).write_result(RESULT)):
        with pytest.raises(OSError, match="Input/output error"):
            attempt(tmp_path)
    assert names(tmp_path) == []


RESULT = RunResult(RunStatus.completed, metrics={"knn": 1.0})


@pytest.mark.parametrize("below", [".", "submissions", "trials/1a2b", "trials/1a2b/claim"])
def test_all_of_a_sweep_create_as_its_record_says_whatever_they_could(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    (folder := tmp_path / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / PLACE).write_text(sealed_json({"exclusive": BY_FOLDERS, "path": str(tmp_path)}))
    with monkeypatch.context() as patch:
        refuse_links(patch, errno.EIO)  # it is not even tried
        assert create_exclusive(folder / "a.json", "first")
    (tmp_path / PLACE).write_text(sealed_json({"exclusive": BY_LINKS, "path": str(tmp_path)}))
    assert not create_exclusive(folder / "a.json", "second")
    refuse_links(monkeypatch)
    with pytest.raises(
        OSError, match="created by hard links, which this machine's mount lacks"
    ):  # another way beside links could have two winners
        create_exclusive(folder / "b.json", "first")


def test_a_record_of_another_way_is_damaged(tmp_path: Path) -> None:
    (tmp_path / PLACE).write_text(json.dumps({"exclusive": "luck", "path": str(tmp_path)}))
    with pytest.raises(
        ValueError, match=r"^place.json must be a file that this project wrote; .*exclusive must be links or folders; got luck"
    ):
        way_of(tmp_path)


def test_a_name_that_a_server_gave_and_then_refused_when_asked_again_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.link

    def twice(source: str, target: str) -> None:
        honest(source, target)
        honest(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert create_exclusive(tmp_path / "a", "ours")
    assert not create_exclusive(tmp_path / "a", "second")


@pytest.mark.parametrize("symbolic", [0, errno.EPERM, errno.ENOSYS])
def test_readers_find_the_newest_attempts_file_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symbolic: int) -> None:
    refuse_links(monkeypatch, errno.EPERM, symbolic)
    check_published(tmp_path)
    assert (tmp_path / "metrics.jsonl").is_symlink() is not bool(symbolic)
    if not symbolic:  # it may be moved
        assert os.readlink(tmp_path / "metrics.jsonl") == "metrics.11.jsonl"


@pytest.mark.nightly
def test_readers_find_the_newest_attempts_file_on_exfat(tmp_path: Path) -> None:
    with exfat(tmp_path) as root:
        check_published(root)
        saved = checkpoint.save(root / "checkpoints", 3, {"x": 1}, 2, 1)
        assert checkpoint.read(checkpoint.adopt(saved, 2), torch.device("cpu")) == {"x": 1}


def check_published(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    assert newest(path) == path
    path.write_text("of a run without claims\n")
    for attempt in (2, 10, 11):
        (folder / f"metrics.{attempt}.jsonl").write_text(f"by {attempt}\n")
        publish(path, attempt, folder)
        assert newest(path).read_text() == RunFolder(folder).records.read_text() == f"by {attempt}\n"
    with open(folder / "metrics.11.jsonl", "a") as file:
        file.write("more\n")
    assert newest(path).read_text() == "by 11\nmore\n"


def test_the_losses_of_a_run_are_read_where_it_has_no_metrics_file_but_its_attempts(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "step", "step": n, "epoch": n / 10, "loss": 5.0 - n, "lr": 0.1}) + "\n" for n in range(1, 4)]
    (tmp_path / "metrics.2.jsonl").write_text(lines[0])
    (tmp_path / "metrics.10.jsonl").write_text("".join(lines[:2]))
    curve = LossCurve(1)
    curve.read(tmp_path / "metrics.jsonl", 1.0)
    assert curve.epoch == 0.2
    with open(tmp_path / "metrics.10.jsonl", "a") as file:
        file.write(lines[2])
    curve.read(tmp_path / "metrics.jsonl", 1.0)
    assert curve.epoch == 0.3
    LossCurve(1).read(tmp_path / "none" / "metrics.jsonl", 1.0)


@pytest.mark.parametrize("number", NO_LINKS)
def test_a_checkpoint_and_an_old_result_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse_links(monkeypatch, number)
    saved = checkpoint.save(tmp_path / "checkpoints", 3, {"step": 3}, 2, 1)
    ours = checkpoint.adopt(saved, 2)
    saved.path.unlink()  # as its own attempt may
    assert checkpoint.read(ours, torch.device("cpu")) == {"step": 3}
    run = RunFolder(tmp_path)
    assert run.write_result(RESULT)
    run.amend_result(RunResult(RunStatus.failed, "collapsed"))
    assert json.loads((tmp_path / "result.completed-1.json").read_text())["metrics"] == {"knn": 1.0}
    assert run.result() == RunResult(RunStatus.failed, "collapsed")
    assert names(tmp_path / "checkpoints") == [ours.path.name]
