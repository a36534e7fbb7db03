"""What a cluster does to jobs, done to them on a real Slurm: no work is lost, nothing runs twice, and the end is the same bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.cli import STOPPED
from sweeps.state import claims
from sweeps.state.submission import Submission
from tests.support.sample import sampled
from tests.support.slurm_bench import ROOT, Faults, SweepOnSlurm, clean_cluster, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [needs_slurm, pytest.mark.slow]
# Tests that compare with the undisturbed sweep run in one process, which makes it once.
with_undisturbed = pytest.mark.xdist_group("slurm-1")


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture(scope="module")
def undisturbed(shared_slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> SweepOnSlurm:
    """A sweep of two CNN-JEPAs from the command to its table."""
    made = SweepOnSlurm(shared_slurm, tmp_path_factory.mktemp("undisturbed"), held=False)
    with clean_cluster(shared_slurm):
        out = made.run("two")
    assert "2 workers, 2 at once" in out
    assert "linear top-1, test" in out
    return made


@with_undisturbed
def test_a_sweep_runs_to_its_table(cluster: SlurmCluster, undisturbed: SweepOnSlurm) -> None:
    status = undisturbed.status()
    assert status["counts"]["completed"] == 2
    for trial in status["trials"]:
        assert trial["job"].partition("_")[0].isdigit()
        assert trial["node"] in cluster.names
        assert trial["restarts"] == 0
        assert trial["gpu_hours"] > 0
    assert {"results.csv", "summary.csv", "ablation.png", "code", "log"} <= set(os.listdir(undisturbed.path))
    for folder in undisturbed.trial_dirs():
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["process"].startswith(str(undisturbed.path / "code"))
        assert provenance["command"][0] == "python"
    again = undisturbed.run("two")
    assert "submitted" not in again
    assert [s.size for s in Submission.all_of(undisturbed.sweep)] == [2]


@with_undisturbed
def test_no_second_cluster_is_started_in_the_folder_of_one_that_runs(cluster: SlurmCluster) -> None:
    line = [sys.executable, str(ROOT / "tests" / "support" / "slurm_cluster.py"), "start", str(cluster.base)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {cluster.base} must be a folder where no cluster runs; got ")
    assert done.stderr.count("\n") == 1
    assert len(cluster.running()) == 7, "munged, mariadbd, slurmdbd, slurmctld and three nodes"
    assert "is UP" in cluster.run("scontrol", "ping")


@with_undisturbed
@pytest.mark.parametrize(
    ("user_signal", "grace", "name"),
    sampled(
        [
            pytest.param(True, 20, "preempted, site with preempt_send_user_signal"),
            pytest.param(False, 20, "preempted by SIGTERM, 20 s of grace"),
            pytest.param(False, 0, "preempted without grace"),
        ],
        1,
        "ways of preemption",
    ),
)
def test_preemption(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, user_signal: bool, grace: int, name: str) -> None:
    cluster = sweep.cluster
    cluster.change(user_signal=user_signal, grace_seconds=grace)
    with faults.line(name, sweep) as said:
        sweep.hold(20)
        sweep.submit("one", "partition=gpu-preempt")
        folder = sweep.wait_for_held(20)
        first, job = sweep.node_of(folder), sweep.job_of(folder)
        urgent = ["sbatch", "-p", "gpu", "-w", first, "--gres=gpu:4", "-t", "2", "-o", "/dev/null", "--wrap", "sleep 1"]
        cluster.run(*urgent)
        sweep.wait_for_end()
        said["happened"] = "saved, requeued, resumed"
    sweep.check_against(undisturbed)
    starts = [c.slurm for c in claims.history(folder)]
    assert [(s.job, s.restart) for s in starts if s] == [(job, 0), (job, 1)]
    assert sweep.lost_steps(folder) == 0


@with_undisturbed
def test_a_time_limit_shorter_than_the_run(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, tmp_path: Path) -> None:
    """A run that is held has not ended when its job's time has.

    Beside it, since Slurm's shortest limit is a minute, two jobs without a run. One heeds no signal, and is requeued just before its limit:
    past that Slurm would end it for good, and with it the chain. One is requeued more often than max_batch_requeue (5), after which Slurm
    holds a job that it has itself requeued: 13 hours in a partition of one take 13 requeues.
    """
    # Without cgroups Slurm loses sight of what outlives the supervisor, as this would.
    heeds_nothing = "sh -c 'trap \"\" TERM USR2; while kill -0 $PPID; do sleep 1; done'"
    deaf = supervised(sweep.cluster, tmp_path / "deaf", heeds_nothing, "-t", "1", "--signal=USR2@20")
    chain = supervised(sweep.cluster, tmp_path / "chain", f"srun sh -c 'exit {STOPPED}'", "-t", "5", "--array=0-0")
    with faults.line("time limit shorter than the run", sweep) as said:
        sweep.hold(20)
        sweep.submit("one", "time_limit_minutes=2", "stop_signal_seconds=20")  # starting may take most of one on a busy machine
        folder = sweep.wait_for_step(20)
        sweep.wait_for_end()
        said["happened"] = "saved before the limit, requeued, went on in the next start"
    sweep.check_against(undisturbed)
    assert len(claims.history(folder)) >= 2
    assert len({c.slurm.job for c in claims.history(folder) if c.slurm}) == 1
    assert sweep.lost_steps(folder) == 0

    again = re.compile(r"Restarts=[1-9]")  # it may have been requeued several times by now
    sweep.wait("the second start", lambda: again.search(sweep.cluster.run("scontrol", "show", "job", deaf)) is not None, 200)
    assert "stopped before the time limit" in (tmp_path / "deaf" / "log").read_text()
    sweep.cluster.run("scancel", "--full", "--signal=KILL", deaf)  # else Slurm waits for it
    restarts = f"squeue -h -r -j {chain} -O RestartCnt".split()
    sweep.wait("more requeues than that", lambda: int(sweep.cluster.run(*restarts)) > 6)
    assert "held" not in sweep.cluster.run("squeue", "-h", "-j", chain, "-O", "Reason").lower()


def supervised(cluster: SlurmCluster, folder: Path, command: str, *options: str) -> str:
    """Submit a job of a supervisor and that command; returns its number."""
    folder.mkdir()
    supervisor = f"{sys.executable} -m jobs.slurm.supervisor --stop-signal-seconds 20 -- {command}"
    (folder / "job.sh").write_text(f"#!/bin/bash\ncd {ROOT}\nexport PYTHONPATH={ROOT}\n{supervisor}\n")
    always = ["--parsable", "--requeue", "--open-mode=append", "-o", str(folder / "log")]
    return cluster.run("sbatch", *always, *options, str(folder / "job.sh")).strip()


@pytest.mark.nightly
@with_undisturbed
def test_requeue_by_the_administrator(cluster: SlurmCluster, faults: Faults, tmp_path: Path) -> None:
    """VICReg: batch statistics and covariances are over both ranks, before and after."""
    short = ["vicreg", "epochs=4"]  # half the batch for each rank
    undisturbed = SweepOnSlurm(cluster, tmp_path / "undisturbed", steps=24, held=False)
    sweep = SweepOnSlurm(cluster, tmp_path / "requeued", steps=24)
    undisturbed.submit(*short)
    with faults.line("scontrol requeue (VICReg)", sweep) as said:
        sweep.hold(8)
        sweep.submit(*short)
        folder = sweep.wait_for_held(8)
        sweep.cluster.run("scontrol", "requeue", sweep.job_of(folder))
        sweep.wait("requeued", lambda: sweep.status()["counts"]["requeued"] == 1, 60)
        sweep.wait_for_end()
        said["happened"] = "saved in KillWait, resumed in the same job"
    undisturbed.wait_for_end()
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


@with_undisturbed
def test_node_loss(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("power cut of the node", sweep) as said:
        sweep.hold(20)
        sweep.submit("one")
        folder = sweep.wait_for_held(20)
        lost = sweep.node_of(folder)
        sweep.cluster.kill_node(lost)
        sweep.release()
        sweep.wait_for_end()
        said["happened"] = "requeued by Slurm to another node, resumed from the last checkpoint"
    sweep.check_against(undisturbed)
    assert sweep.node_of(folder) != lost


@pytest.mark.nightly
@with_undisturbed
@pytest.mark.parametrize("suspended", [True, False], ids=["suspended", "going on"])
def test_slurmd_alone_dies_and_the_first_owner_outlives_the_takeover(
    sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, suspended: bool
) -> None:
    """Slurm loses sight of the node and requeues the job: two owners for a while, whichever of them is the faster one."""
    sweep.hold(20)
    sweep.submit("one")
    folder = sweep.wait_for_held(20)
    lost = sweep.node_of(folder)
    ranks = [sweep.rank_process(folder, rank) for rank in (0, 1)]
    daemons = [p for p in map(psutil.Process, sweep.cluster.processes_of_node(lost)) if p.name() == "slurmd"]
    assert daemons
    for process in daemons:
        process.kill()
    for rank in ranks if suspended else ():
        rank.suspend()
    try:
        sweep.hold(24)
        sweep.wait("the takeover", lambda: len(claims.history(folder)) > 1)
        sweep.wait("the second owner", lambda: (folder / "metrics.2.jsonl").exists() and sweep.step_of(folder) >= 24)
    finally:
        second = sorted((folder / "checkpoints").glob("*-000002-*.pt"))
        for rank in ranks:
            rank.resume()
    assert second
    if not suspended:
        sweep.release()  # for which both stand still
    sweep.wait("the first owner's end", lambda: (folder / "claim" / "000001.released").exists() or not ranks[0].is_running(), 120)
    assert second[-1].exists() or not suspended  # the second owner stands still meanwhile
    sweep.cluster.kill_node(lost)  # what is left of it
    sweep.release()
    sweep.wait_for_end()
    sweep.check_against(undisturbed)
    assert sweep.node_of(folder) != lost


@pytest.mark.nightly
@with_undisturbed
def test_the_controller_is_away_for_20_seconds(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("slurmctld stopped for 20 s", sweep) as said:
        sweep.hold(20)
        child = sweep.start("one")
        folder = sweep.wait_for_held(20)
        sweep.cluster.stop_controller()
        stopped, asked = time.monotonic(), set()
        sweep.hold(26)
        sweep.wait_for_step(26)

        def asked_in_vain() -> bool:
            """The watching command has asked, and has heard that nobody answers: what asked has ended."""
            asked.update(p for p in psutil.Process(child.pid).children(recursive=True) if p.name() == "squeue")
            return any(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in asked)

        sweep.wait("a question in vain, and 20 s", lambda: asked_in_vain() and time.monotonic() - stopped >= 20)
        sweep.cluster.start_controller()
        sweep.release()
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0, out
        said["happened"] = "training went on, the watching command waited; nothing was submitted again"
    sweep.check_against(undisturbed)
    assert len(claims.history(folder)) == 1
    assert out.count("submitted") == 1


@with_undisturbed
def test_a_cancelled_job_stays_cancelled_until_the_sweep_is_run_again(
    sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults
) -> None:
    with faults.line("scancel, and later the same command again", sweep) as said:
        sweep.hold(20)
        first = sweep.start("one")
        folder = sweep.wait_for_held(20)
        first.kill()
        first.communicate()
        sweep.submit("one")
        child = sweep.start_alone("one", environment={"PYTHONUNBUFFERED": "1"})
        assert child.stdout is not None
        first_look = child.stdout.readline()  # before the job is cancelled: a command started after that submits it again
        assert "1 running of 1" in first_look, first_look
        sweep.cluster.run("scancel", sweep.job_of(folder))
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 130, out
        assert "1 cancelled" in out
        sweep.wait("the job's end", lambda: not sweep.live_jobs())
        sweep.cluster.run("sbatch", "--wait", "-o", "/dev/null", "--wrap", "true")  # Slurm has gone through its queue since
        assert sweep.live_jobs() == []
        assert sweep.status()["counts"]["cancelled"] == 1
        assert not (folder / "result.json").exists()
        sweep.submit("one")
        sweep.wait_for_end()
        said["happened"] = "saved, stayed cancelled, resumed when asked"
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


@with_undisturbed
@pytest.mark.parametrize("rank", sampled([0, 1], 1, "ranks that die"))
def test_death_of_a_rank(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, rank: int) -> None:
    with faults.line(f"rank {rank} killed -9 (as by the OOM killer)", sweep) as said:
        sweep.hold(20)
        sweep.submit("one")
        folder = sweep.wait_for_held(20)
        sweep.rank_process(folder, rank).kill()
        sweep.release()
        sweep.wait_for_end()
        said["happened"] = "started again in place by the supervisor, resumed from the last checkpoint"
    sweep.check_against(undisturbed)
    starts = [c.slurm for c in claims.history(folder)]
    assert [s.restart for s in starts if s] == [0, 0]


@with_undisturbed
def test_one_rank_alone_is_asked_to_stop(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    rank = 1  # not the one that holds the claim
    with faults.line(f"SIGTERM to rank {rank} alone", sweep) as said:
        sweep.hold(20)
        sweep.submit("one")
        folder = sweep.wait_for_held(20)
        sweep.rank_process(folder, rank).send_signal(signal.SIGTERM)
        sweep.release()
        sweep.wait_for_end()
        said["happened"] = "all ranks stopped at the same step, saved, requeued, resumed"
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


WRAPPER = """#!/bin/bash
# Kills the command that called us, before or after the real sbatch.
case "$*" in *--test-only*) exec {real} "$@";; esac
if [ {moment} = after ]; then {real} "$@" > /dev/null; fi
kill -9 $PPID
"""


@with_undisturbed
@pytest.mark.parametrize("moment", sampled(["before", "after"], 1, "moments around sbatch"))
def test_the_submitting_command_is_killed_around_sbatch(
    sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, tmp_path: Path, moment: str
) -> None:
    with faults.line(f"submitting command killed -9 just {moment} sbatch", sweep) as said:
        folder = tmp_path / "bin"
        folder.mkdir()
        real = sweep.cluster.run("which", "sbatch").strip()
        (folder / "sbatch").write_text(WRAPPER.format(real=real, moment=moment))
        (folder / "sbatch").chmod(0o755)
        environment = {"PATH": f"{folder}:{sweep.cluster.environment['PATH']}"}
        child = sweep.start_alone("one", "--detach", environment=environment)
        child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL
        assert len(sweep.live_jobs()) == (1 if moment == "after" else 0)
        out = sweep.submit("one")
        assert ("adopted job" in out) == (moment == "after")
        assert ("submitted job" in out) == (moment == "before")
        sweep.wait_for_end()
        said["happened"] = (
            "run again: the job is found by its name" if moment == "after" else "run again: nothing was queued, submitted once"
        )
    sweep.check_against(undisturbed)
    assert len(sweep.jobs()) == 1


@with_undisturbed
def test_the_watching_command_is_killed_and_two_watch_again(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("submitting command killed -9 while it watches, then run twice at once", sweep) as said:
        sweep.hold(20)
        child = sweep.start("two")
        sweep.wait_for_held(20)
        child.kill()
        child.communicate()
        pair = [sweep.start_alone("two", environment={"PYTHONUNBUFFERED": "1"}) for _ in range(2)]
        first_looks = [c.stdout.readline() for c in pair if c.stdout]
        assert all("of 2" in look and "completed" not in look for look in first_looks), first_looks
        sweep.release()
        outs = [c.communicate(timeout=300)[0] for c in pair]
        assert [c.returncode for c in pair] == [0, 0], outs
        assert not any("submitted" in out for out in (*first_looks, *outs)), (first_looks, outs)
        said["happened"] = "the jobs ran on their own; both commands showed the same table"
    sweep.check_against(undisturbed)
    assert all(len(claims.history(d)) == 1 for d in sweep.trial_dirs())
    assert len(sweep.jobs()) == 2
