"""What a cluster does to jobs, done to them on a real Slurm: no work is lost, nothing runs twice, and the end is the same bit for bit."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.door import STOPPED
from sweeps import claims
from tests.slurm_cluster import SlurmCluster
from tests.sweeps.slurm_bench import ROOT, STEPS, Faults, SweepOnSlurm, needs_slurm, running_cluster

pytestmark = [needs_slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture
def sweep(cluster: SlurmCluster, tmp_path: Path) -> Iterator[SweepOnSlurm]:
    made = SweepOnSlurm(cluster, tmp_path)
    yield made
    cluster.run("scancel", "--user", str(os.getuid()), "--quiet", check=False)
    cluster.wait("an empty queue", lambda: not cluster.run("squeue", "-h").strip(), 90)
    for name in cluster.names:
        if cluster.pid(name) is None:
            cluster.start_node(name)
    cluster.run("scontrol", "update", f"nodename={','.join(cluster.names)}", "state=resume", check=False)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> SweepOnSlurm:
    """A sweep of two CNN-JEPAs and a VICReg from the command to its table."""
    made = SweepOnSlurm(cluster, tmp_path_factory.mktemp("undisturbed"))
    out = made.run("methods")
    assert "3 slots, 3 at once" in out
    assert "linear top-1, test" in out
    return made


def test_a_sweep_runs_to_its_table(undisturbed: SweepOnSlurm) -> None:
    status = undisturbed.status()
    assert status["counts"]["completed"] == 3
    for trial in status["trials"]:
        assert trial["job"].partition("_")[0].isdigit()
        assert trial["node"] in undisturbed.cluster.names
        assert trial["restarts"] == 0
        assert trial["gpu_hours"] > 0
    assert {"results.csv", "summary.csv", "ablation.png", "code", "log"} <= set(os.listdir(undisturbed.path))
    for folder in undisturbed.trial_dirs():
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["command"][0].startswith(str(undisturbed.path / "code"))
    again = undisturbed.run("methods")
    assert "submitted" not in again
    assert len(undisturbed.jobs()) == 3


@pytest.mark.parametrize(
    ("user_signal", "grace", "name"),
    [
        (True, 20, "preempted, site with preempt_send_user_signal"),
        (False, 20, "preempted by SIGTERM, 20 s of grace"),
        (False, 0, "preempted without grace"),
    ],
)
def test_preemption(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, user_signal: bool, grace: int, name: str) -> None:
    cluster = sweep.cluster
    if (cluster.options.user_signal, cluster.options.grace_seconds) != (user_signal, grace):
        cluster.change(user_signal=user_signal, grace_seconds=grace)
    with faults.line(name, sweep) as said:
        sweep.submit("one", "partition=gpu-preempt")
        folder = sweep.wait_for_step(60)
        first, job = sweep.node_of(folder), sweep.job_of(folder)
        urgent = ["sbatch", "-p", "gpu", "-w", first, "--gres=gpu:4", "-t", "2", "-o", "/dev/null", "--wrap", "sleep 10"]
        cluster.run(*urgent)
        sweep.wait_for_end()
        said["happened"] = "saved, requeued, resumed"
    sweep.check_against(undisturbed)
    starts = [c.slurm for c in claims.history(folder)]
    assert [(s.job, s.restart) for s in starts if s] == [(job, 0), (job, 1)]
    assert sweep.lost_steps(folder) == 0


def test_a_time_limit_shorter_than_the_run(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    """Suspended ranks carry the run to the end of the time that its job has; Slurm wakes them when it tells them."""
    with faults.line("time limit shorter than the run", sweep) as said:
        sweep.submit("one", "time_limit_minutes=2", "stop_signal_seconds=20")  # starting may take most of one on a busy machine
        folder = sweep.wait_for_step(60)
        for rank in range(4):
            sweep.rank_process(folder, rank).suspend()
        sweep.wait_for_end()
        said["happened"] = "saved before the limit, requeued, went on in the next start"
    sweep.check_against(undisturbed)
    assert len(claims.history(folder)) >= 2
    assert len({c.slurm.job for c in claims.history(folder) if c.slurm}) == 1
    assert sweep.lost_steps(folder) == 0


def test_a_job_that_heeds_no_signal_is_requeued_just_before_its_limit(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Past its limit Slurm would end it for good, and with it the chain."""
    root, log = Path(__file__).parents[2], tmp_path / "log"
    supervisor = f"{sys.executable} -m jobs.supervisor --stop-signal-seconds 20 -- sh -c 'trap \"\" TERM USR2; sleep 200 & wait; wait'"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\ncd {root}\nexport PYTHONPATH={root}\n{supervisor}\n")
    options = ["--parsable", "--requeue", "--open-mode=append", "-t", "1", "--signal=USR2@20", "-o", str(log)]
    job = cluster.run("sbatch", *options, str(tmp_path / "job.sh")).strip()
    try:
        cluster.wait("the second start", lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job), 100)
        assert "stopped before the time limit" in log.read_text()
    finally:
        cluster.run("scancel", job)
    cluster.wait("its end", lambda: not cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG", check=False).strip(), 60)


def test_a_chain_of_jobs_is_longer_than_slurms_own_count_of_requeues(cluster: SlurmCluster, tmp_path: Path) -> None:
    """max_batch_requeue (5) holds a job that Slurm itself requeues so often; 13 hours in a partition of one take 13 requeues."""
    root, log = Path(__file__).parents[2], tmp_path / "log"
    supervisor = f"{sys.executable} -m jobs.supervisor --stop-signal-seconds 20 -- srun sh -c 'exit {STOPPED}'"
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\ncd {root}\nexport PYTHONPATH={root}\n{supervisor}\n")
    options = ["--parsable", "--requeue", "--open-mode=append", "-t", "5", "--array=0-0", "-o", str(log)]
    job = cluster.run("sbatch", *options, str(tmp_path / "job.sh")).strip()
    restarts = f"squeue -h -r -j {job} -O RestartCnt".split()
    try:
        cluster.wait("more requeues than that", lambda: int(cluster.run(*restarts)) > 6, 120)
        assert "held" not in cluster.run("squeue", "-h", "-j", job, "-O", "Reason").lower()
    finally:
        cluster.run("scancel", job)
    cluster.wait("its end", lambda: not cluster.run("squeue", "-h", "-j", job, "-t", "PD,R,CG", check=False).strip(), 60)


def test_requeue_by_the_administrator(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    """VICReg: batch statistics and covariances are over all four ranks, before and after."""
    with faults.line("scontrol requeue (VICReg)", sweep) as said:
        sweep.submit("vicreg")
        folder = sweep.wait_for_step(60)
        sweep.cluster.run("scontrol", "requeue", sweep.job_of(folder))
        sweep.wait("requeued", lambda: sweep.status()["counts"]["requeued"] == 1, 30)
        sweep.wait_for_end()
        said["happened"] = "saved in KillWait, resumed in the same job"
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


def test_node_loss(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("power cut of the node", sweep) as said:
        sweep.submit("one")
        folder = sweep.wait_for_step(100)
        lost = sweep.node_of(folder)
        sweep.cluster.kill_node(lost)
        sweep.wait_for_end()
        said["happened"] = "requeued by Slurm to another node, resumed from the last checkpoint"
    sweep.check_against(undisturbed)
    assert sweep.node_of(folder) != lost


def test_the_controller_is_away_for_20_seconds(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("slurmctld stopped for 20 s", sweep) as said:
        child = sweep.start("one")
        folder = sweep.wait_for_step(60)
        sweep.cluster.stop_controller()
        time.sleep(20)
        sweep.cluster.start_controller()
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0, out
        said["happened"] = "training went on, the watching command waited; nothing was submitted again"
    sweep.check_against(undisturbed)
    assert len(claims.history(folder)) == 1
    assert out.count("submitted") == 1


def test_a_cancelled_job_stays_cancelled_until_the_sweep_is_run_again(
    sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults
) -> None:
    with faults.line("scancel, and later the same command again", sweep) as said:
        first = sweep.start("one")
        folder = sweep.wait_for_step(30)
        first.kill()
        first.communicate()
        for rank in range(4):
            sweep.rank_process(folder, rank).suspend()  # else it might end meanwhile; the job's end wakes it
        sweep.submit("one")
        child = sweep.start("one", environment={"PYTHONUNBUFFERED": "1"})
        assert child.stdout is not None
        first_look = child.stdout.readline()  # before the job is cancelled: a command started after that submits it again
        assert "1 running of 1" in first_look, first_look
        sweep.cluster.run("scancel", sweep.job_of(folder))
        out, _ = child.communicate(timeout=120)
        assert child.returncode == 130, out
        assert "1 cancelled" in out
        time.sleep(10)
        assert sweep.live_jobs() == []
        assert sweep.status()["counts"]["cancelled"] == 1
        assert not (folder / "result.json").exists()
        sweep.submit("one")
        sweep.wait_for_end()
        said["happened"] = "saved, stayed cancelled, resumed when asked"
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


@pytest.mark.parametrize("rank", [0, 3])
def test_death_of_a_rank(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults, rank: int) -> None:
    with faults.line(f"rank {rank} killed -9 (as by the OOM killer)", sweep) as said:
        sweep.submit("one")
        folder = sweep.wait_for_step(100)
        sweep.rank_process(folder, rank).kill()
        sweep.wait_for_end()
        said["happened"] = "started again in place by the supervisor, resumed from the last checkpoint"
    sweep.check_against(undisturbed)
    starts = [c.slurm for c in claims.history(folder)]
    assert [s.restart for s in starts if s] == [0, 0]


def test_one_rank_alone_is_told_to_stop(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("SIGTERM to rank 2 alone", sweep) as said:
        sweep.submit("one")
        folder = sweep.wait_for_step(60)
        sweep.rank_process(folder, 2).send_signal(signal.SIGTERM)
        sweep.wait_for_end()
        said["happened"] = "all ranks stopped at the same step, saved, requeued, resumed"
    sweep.check_against(undisturbed)
    assert sweep.lost_steps(folder) == 0


def test_a_run_that_dies_twice_without_gaining_a_step_is_failed_with_its_log(sweep: SweepOnSlurm) -> None:
    sweep.submit("one", "checkpoint.every_minutes=1000")
    folder = sweep.wait_for_step(20)
    for start in (1, 2):
        sweep.wait(f"start {start}", lambda start=start: len(claims.history(folder)) == start)
        time.sleep(1.5)
        sweep.rank_process(folder, 1).kill()
    sweep.wait_for_end()
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert "its process died 2 times at step 0 without gaining a step" in result["cause"]
    assert "Killed" in result["cause"]
    out = sweep.run("one", code=1)
    assert "depth 1, seed 42: failed: its process died" in out
    assert "submitted" not in out


def test_jobs_that_cannot_start_end_the_command_with_their_log(sweep: SweepOnSlurm) -> None:
    out = sweep.run("one", "python=/bin/false", code=1)
    assert "jobs end before they begin a trial:" in out
    assert "died 4 times in a row, giving up" in out
    assert len(sweep.jobs()) == 1


WRAPPER = """#!/bin/bash
# Kills the command that called timeout, which called us, before or after the real sbatch.
case "$*" in *--test-only*) exec {real} "$@";; esac
submitter=$(ps -o ppid= -p $PPID)
if [ {moment} = after ]; then {real} "$@" > /dev/null; fi
kill -9 $submitter
"""


@pytest.mark.parametrize("moment", ["before", "after"])
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
        child = sweep.start("one", "--detach", environment=environment)
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


def test_the_watching_command_is_killed_and_two_watch_again(sweep: SweepOnSlurm, undisturbed: SweepOnSlurm, faults: Faults) -> None:
    with faults.line("submitting command killed -9 while it watches, then run twice at once", sweep) as said:
        child = sweep.start("two")
        sweep.wait_for_step(30)
        child.kill()
        child.communicate()
        pair = [sweep.start("two") for _ in range(2)]
        outs = [c.communicate(timeout=300)[0] for c in pair]
        assert [c.returncode for c in pair] == [0, 0], outs
        assert not any("submitted" in out for out in outs)
        said["happened"] = "the jobs need nobody; both commands showed the same table"
    sweep.check_against(undisturbed)
    assert all(len(claims.history(d)) == 1 for d in sweep.trial_dirs())
    assert len(sweep.jobs()) == 2


def test_two_commands_at_once_submit_each_slot_once(sweep: SweepOnSlurm) -> None:
    short = ["epochs=2", "optimizer.warmup_epochs=0"]
    pair = [sweep.start(*short, "--detach") for _ in range(2)]
    outs = [c.communicate(timeout=200)[0] for c in pair]
    assert [c.returncode for c in pair] == [0, 0], outs
    sweep.wait_for_end()
    for folder in sweep.trial_dirs():
        assert len(claims.history(folder)) == 1
        assert (folder / "log" / "train.log").read_text().count("step 1/") == 1


def test_never_more_than_max_parallel_at_once(sweep: SweepOnSlurm) -> None:
    short = ["epochs=2", "optimizer.warmup_epochs=0", "max_parallel=1"]
    out = sweep.submit(*short)
    assert "3 slots, 1 at once" in out
    seen, deadline = set(), time.monotonic() + 240
    while sweep.live_jobs() and time.monotonic() < deadline:
        seen.add(sum(j.endswith(":RUNNING") for j in sweep.jobs()))
        time.sleep(0.3)
    assert seen <= {0, 1}
    assert 1 in seen
    assert sweep.status()["counts"]["completed"] == 3


def test_a_sweep_larger_than_the_sites_arrays_is_split_and_keeps_its_throttle(sweep: SweepOnSlurm) -> None:
    site = sweep.cluster.options.max_array_size
    sweep.cluster.change(max_array_size=2)
    try:
        out = sweep.submit("epochs=2", "optimizer.warmup_epochs=0", "max_parallel=2")
        assert "2 slots, 1 at once" in out
        assert "1 slots, 1 at once" in out
        sweep.wait_for_end()
    finally:
        sweep.cluster.change(max_array_size=site)
    assert len({j.partition("_")[0] for j in sweep.jobs()}) == 2
    assert all(len(claims.history(d)) == 1 for d in sweep.trial_dirs())
    assert sweep.status()["counts"]["completed"] == 3


def test_cancel_logs_and_a_changed_sweep(sweep: SweepOnSlurm) -> None:
    """Two settings, one at a time; the running one is cancelled by name, then all; then the sweep grows by a setting and shrinks again."""
    out = sweep.submit("two", "max_parallel=1")
    folder = sweep.wait_for_step(20)
    assert f"step 1/{STEPS}" in sweep.ask("logs", "--no-follow")
    assert "1 trials cancelled, 1 jobs ended" in sweep.ask("cancel", folder.name[:6])
    sweep.wait("the other one", lambda: sweep.status()["counts"]["running"] == 1)
    counts = sweep.status()["counts"]
    assert (counts["cancelled"], counts["running"]) == (1, 1)
    assert "1 trials cancelled, 1 jobs ended" in sweep.ask("cancel")
    sweep.wait("no job", lambda: not sweep.live_jobs(), 60)
    assert sweep.status()["counts"]["cancelled"] == 2
    sweep.cluster.run("scontrol", "update", f"nodename={','.join(sweep.cluster.names)}", "state=drain", "reason=test")
    out = sweep.submit()
    assert "the sweep has changed since it was last run: 1 trials added, 0 withdrawn" in out
    assert "3 slots, 3 at once" in out
    out = sweep.submit("one")
    assert "0 trials added, 2 withdrawn" in out
    assert "2 waiting slots withdrawn" in out
    assert len(sweep.live_jobs()) == 1


def test_a_pending_job_runs_the_code_of_its_submission(sweep: SweepOnSlurm, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    root = Path(__file__).parents[2]
    for part in ("cnnjepa", "jobs", "sweeps", "slurm", "tests"):
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "pyproject.toml").write_text((root / "pyproject.toml").read_text())
    names = ",".join(sweep.cluster.names)
    sweep.cluster.run("scontrol", "update", f"nodename={names}", "state=drain", "reason=test")
    environment = {"PYTHONPATH": str(copy)}
    short = ["epochs=2", "optimizer.warmup_epochs=0"]
    sweep.submit("one", *short, environment=environment, script=copy / "tests" / "sweeps" / "slurm_sweep.py")
    (copy / "cnnjepa" / "train.py").write_text("raise RuntimeError('edited since')\n")
    sweep.cluster.run("scontrol", "update", f"nodename={names}", "state=resume")
    sweep.wait_for_end()
    (folder,) = sweep.trial_dirs()
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    start = claims.history(folder)[0].slurm
    assert start is not None
    assert "edited since" not in (Path(start.code) / "cnnjepa" / "train.py").read_text()


def test_nothing_is_left_running(cluster: SlurmCluster) -> None:
    """The last test of the file: no rank, supervisor or srun outlives its job."""

    def left() -> list[str]:
        below = [psutil.Process(p) for name in cluster.names for p in cluster.processes_of_node(name)]
        return [" ".join(p.cmdline()) for p in below if any(w in p.cmdline() for w in ("sweeps.engine.rank", "jobs.supervisor"))]

    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left() == []


def test_slots_of_a_search_take_one_trial_after_the_other_until_it_is_over(sweep: SweepOnSlurm) -> None:
    searched = SweepOnSlurm(sweep.cluster, sweep.runs)
    searched.path = sweep.runs / "tiny_search-smoke"
    script = ROOT / "tests" / "sweeps" / "tiny_search.py"
    searched.run("--eta", "2", "micro_batch_size=8", "max_parallel=2", script=script, environment={"PYTHONPATH": str(ROOT)})
    owners = [claims.history(d) for d in searched.trial_dirs()]
    assert all(len(past) == 1 for past in owners)  # none was run twice
    jobs = [past[0].slurm.job for past in owners if past[0].slurm]
    assert len(owners) > 8
    assert len(jobs) == len(owners)
    assert len(set(jobs)) <= 2
    counts = searched.status()["counts"]
    assert counts["pruned"] >= 1
    assert counts["pruned"] + counts["completed"] == len(owners)
