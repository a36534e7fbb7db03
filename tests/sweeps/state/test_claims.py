import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.slurm.queue import GONE
from sweeps.state import claims
from sweeps.state.claims import Claim, Process, SlurmStart, Standing, Watch


def try_to_claim(folder: Path, gate: object, wins: object) -> None:
    gate.wait()  # type: ignore[attr-defined]
    for attempt in range(1, 21):
        owned = claims.claim(folder / str(attempt), 1, "d", 0)
        if owned:
            wins.put((attempt, os.getpid()))  # type: ignore[attr-defined]


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
    assert [attempt for attempt, _ in won] == list(range(1, 21))
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
    assert [(c.attempt, c.step) for c in claims.history(tmp_path)] == [(1, 0), (2, 5)]


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


def test_an_owner_elsewhere_is_dead_only_after_its_heartbeat_stood_still_on_our_clock(tmp_path: Path) -> None:
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
    assert not Watch(watch.silent)._lives(tmp_path, claim, claims.listing(tmp_path))  # who has not watched hears it


def test_the_heartbeat(tmp_path: Path, monkeypatch: object) -> None:
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


ELSEWHERE = Process("elsewhere", "boot", "", 1, 0.0)
START = SlurmStart("mini", "7_3", 0, "gpu01", 4, "/log", "/code")


class Forgetful:
    """A Slurm that answers and knows no job."""

    silent = False

    def is_elsewhere(self, cluster: str) -> bool:
        return False

    def state(self, job: str) -> str:
        return GONE


def test_heartbeat_staleness_and_silence_fit_each_other() -> None:
    """A beat may be missed, seen a minute late (a cache of file attributes) and dated by a clock that is a minute off."""
    assert claims.STALE_SECONDS >= 3 * claims.HEARTBEAT_SECONDS + 60 + 60
    assert claims.SILENCE_SECONDS >= 3 * claims.STALE_SECONDS
    assert claims.HEARTBEAT_SECONDS >= 10  # each is a write to a shared disk, of every running trial
    assert claims.SILENCE_SECONDS <= 600  # the trials of a machine that died wait for so long


@pytest.mark.parametrize("clocks_apart", [-60.0, 0.0, 60.0])
def test_a_living_owner_is_never_taken_over_and_a_dead_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks_apart: float) -> None:
    """An hour of an owner's heartbeat, on a clock of ours, as its watchers see it: by the clock alone, and where Slurm forgot the job."""
    owned = claims.claim(tmp_path, 1, "d", 0)
    assert owned is not None
    path, now, touch = tmp_path / "claim" / "000001.json", [1e6], os.utime
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0] + clocks_apart))
    monkeypatch.setattr(claims.os, "utime", lambda path: touch(path, (now[0], now[0])))
    touch(path, (now[0], now[0]))
    foreign = Claim(1, ELSEWHERE, "d", 0, now[0])
    by_the_clock, by_slurm = Watch(), Watch(queue=Forgetful())  # type: ignore[arg-type]

    def judged() -> list[Standing]:
        return [by_the_clock.standing(tmp_path, foreign), by_slurm.standing(tmp_path, replace(foreign, slurm=START))]

    class Passing:
        """Time that passes between two beats, under the watchers' eyes."""

        def wait(self, seconds: float) -> bool:
            end = now[0] + seconds
            while now[0] < end:
                now[0] = min(now[0] + 5, end)
                assert judged() == [Standing.alive, Standing.alive]
            return now[0] >= 1e6 + 3600

    owned._ended = Passing()  # type: ignore[assignment]
    owned._keep_beating()
    last = path.stat().st_mtime
    assert last >= 1e6 + 3600 - 2 * claims.HEARTBEAT_SECONDS
    now[0] = last + claims.STALE_SECONDS + 1 + abs(clocks_apart)
    assert judged() == [Standing.alive, Standing.dead]
    now[0] = last + claims.HEARTBEAT_SECONDS + claims.SILENCE_SECONDS
    assert judged()[0] is Standing.dead


def test_an_owner_is_silent_for_exactly_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    assert claims.claim(tmp_path, 1, "d", 0)
    watch, foreign = Watch(), Claim(1, ELSEWHERE, "d", 0, 0.0)
    assert watch.standing(tmp_path, foreign) is Standing.alive
    now[0] = 50.0 + claims.SILENCE_SECONDS - 1
    assert watch.standing(tmp_path, foreign) is Standing.alive
    now[0] += 1
    assert watch.standing(tmp_path, foreign) is Standing.dead


def test_a_forgotten_job_whose_owner_said_that_it_ended_is_dead_at_once(tmp_path: Path) -> None:
    assert claims.claim(tmp_path, 1, "d", 0, START)
    watch, foreign = Watch(queue=Forgetful()), Claim(1, ELSEWHERE, "d", 0, 0.0, START)  # type: ignore[arg-type]
    path = tmp_path / "claim" / "000001.json"
    assert watch.standing(tmp_path, foreign) is Standing.alive
    ahead = time.time() + claims.STALE_SECONDS + 100  # of a clock that is far off: it says nothing of a heartbeat that goes on
    os.utime(path, (ahead, ahead))
    assert watch.standing(tmp_path, foreign) is Standing.dead
    os.utime(path)
    (tmp_path / "claim" / "000001.released").touch()
    assert watch.standing(tmp_path, foreign) is Standing.dead


@pytest.mark.parametrize("end", ["released", "crashed"])
def test_a_trial_was_held_from_its_claim_to_its_owners_last_sign(tmp_path: Path, end: str) -> None:
    assert claims.claim(tmp_path, 1, "d", 0)
    path, claim = tmp_path / "claim" / "000001.json", Claim(1, ELSEWHERE, "d", 0, 1000.0)
    os.utime(path, (1120, 1120))
    assert claims.held_seconds(tmp_path, claim) == 120
    path.with_suffix(f".{end}").touch()
    os.utime(path.with_suffix(f".{end}"), (1135, 1135))
    assert claims.held_seconds(tmp_path, claim) == 135
    assert claims.held_seconds(tmp_path, replace(claim, time=1200.0)) == 0  # another clock: never less than nothing


def test_deaths_before_a_person_took_the_trial_up_again_are_forgiven(tmp_path: Path) -> None:
    past = [Claim(attempt, Process.me(), "d", 7, 0.0) for attempt in (1, 2, 3)]
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "000002.resumed").touch()
    assert claims.crashes_in_place(past, 7, "d", tmp_path) == 1


def test_a_start_has_its_own_node_where_it_shares_a_job_and_the_jobs_nodes_where_not() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "gpu02", "SLURM_JOB_NODELIST": "gpu[01-03]", "SLURM_RESTART_COUNT": "2"}
    alone, beside = (SlurmStart.me(4, "/log", "/code", environment, shared) for shared in (False, True))
    assert alone == SlurmStart("", "7", 2, "gpu[01-03]", 4, "/log", "/code")
    assert beside == SlurmStart("", "7", 2, "gpu02", 4, "/log", "/code", True)
    assert SlurmStart.me(4, "/log", "/code", {}) is None
