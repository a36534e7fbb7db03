import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from sweeps import claims
from sweeps.claims import Claim, Process, Watch


def try_to_claim(folder: Path, gate: object, wins: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    for epoch in range(1, 21):
        owned = claims.claim(folder / str(epoch), 1, "d", 0)
        if owned:
            wins.put((epoch, os.getpid()))  # type: ignore[attr-defined]


def test_of_many_who_claim_at_once_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate, wins = context.Barrier(8), context.Queue()
    children = [context.Process(target=try_to_claim, args=(tmp_path, gate, wins)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    won = sorted(wins.get() for _ in range(20))
    assert [epoch for epoch, _ in won] == list(range(1, 21))
    assert wins.empty()
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_owner_lives_until_its_process_ends_or_releases(tmp_path: Path) -> None:
    owned = claims.claim(tmp_path, 1, "d", 0)
    assert owned is not None
    watch = Watch()
    assert watch._lives(tmp_path, owned.claim, claims.listing(tmp_path))
    with owned:
        assert not owned.lost()
        assert claims.claim(tmp_path, 1, "d", 0) is None
        assert claims.claim(tmp_path, 2, "d", 5) is not None
        assert owned.lost()
    assert not watch._lives(tmp_path, owned.claim, claims.listing(tmp_path))
    assert [(c.epoch, c.step) for c in claims.history(tmp_path)] == [(1, 0), (2, 5)]


def test_a_killed_owner_is_dead_also_when_its_number_is_taken_again() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    me = Process.me()
    import psutil

    alive = Process(me.host, me.boot, me.namespace, child.pid, psutil.Process(child.pid).create_time())
    assert alive.lives()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie until it is waited for
    assert not alive.lives()
    child.wait()
    assert not alive.lives()
    assert not Process(me.host, me.boot, me.namespace, me.pid, me.started - 100).lives()
    assert not Process(me.host, me.boot, "another container", me.pid, me.started).is_local


def test_what_ran_before_a_reboot_is_dead_at_once(tmp_path: Path) -> None:
    me = Process.me()
    earlier = Claim(1, Process(me.host, "an earlier boot", me.namespace, me.pid, me.started), "d", 0, 0.0)
    assert not Watch()._lives(tmp_path, earlier, claims.listing(tmp_path))


def test_an_owner_elsewhere_is_dead_only_after_its_heart_stood_still_on_our_clock(tmp_path: Path) -> None:
    foreign = Process("elsewhere", "boot", "", 1, 0.0)
    assert claims.claim(tmp_path, 1, "d", 0)
    path = tmp_path / "claim" / "000001.json"
    claim = Claim(1, foreign, "d", 0, 0.0)
    os.utime(path, (0, 0))  # the other clock is far off: that says nothing
    watch = Watch(silence_seconds=0.3)
    assert watch._lives(tmp_path, claim, claims.listing(tmp_path))
    for i in range(5):
        time.sleep(0.1)
        os.utime(path, (i + 1, i + 1))
        assert watch._lives(tmp_path, claim, claims.listing(tmp_path))
    time.sleep(0.35)
    assert not watch._lives(tmp_path, claim, claims.listing(tmp_path))
    assert watch.silent == {path}
    assert Watch()._lives(tmp_path, claim, claims.listing(tmp_path))
    assert not Watch(watch.silent)._lives(tmp_path, claim, claims.listing(tmp_path))  # who has not watched is told


def test_the_heart_beats(tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)  # type: ignore[attr-defined]
    owned = claims.claim(tmp_path, 1, "d", 0)
    assert owned is not None
    path = tmp_path / "claim" / "000001.json"
    os.utime(path, (0, 0))
    with owned:
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert path.stat().st_mtime > 0


def test_only_deaths_under_the_same_driver_and_without_a_step_count_as_crashes(tmp_path: Path) -> None:
    me, other = "this driver", "another"

    def crashes(*past: tuple[int, str]) -> int:
        made = [Claim(i + 1, Process.me(), driver, step, 0.0) for i, (step, driver) in enumerate(past)]
        return claims.crashes_in_place(made, 7, me, tmp_path)

    assert crashes((7, me), (7, me)) == 2
    assert crashes((7, me), (7, other)) == 0  # the driver died with it: no fault of the trial
    assert crashes((0, me), (7, me)) == 1  # the claim before had gained steps
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "000002.released").touch()
    assert crashes((7, me), (7, me)) == 0  # it was asked to stop
    (tmp_path / "claim" / "000002.released").rename(tmp_path / "claim" / "000002.crashed")
    assert crashes((7, me), (7, me)) == 2
