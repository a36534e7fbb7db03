"""Sweeps on a real Slurm that nobody disturbs: limits, throttles, cancels, a changed sweep, and jobs that cannot go on."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from sweeps.state import claims
from tests.support import forked
from tests.support.slurm_bench import ROOT, STEPS, SweepOnSlurm, needs_slurm

pytestmark = [needs_slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm-3")]
SHORT = ["epochs=2", "optimizer.warmup_epochs=0"]


@pytest.mark.nightly
def test_a_run_that_dies_twice_on_each_of_two_nodes_without_gaining_a_step_is_failed_with_its_log(sweep: SweepOnSlurm) -> None:
    sweep.hold(5)
    sweep.submit("one", "checkpoint.every_minutes=1000")
    folder = sweep.wait_for_step(5)
    for start in (1, 2, 3, 4):
        held = re.compile(f"^step 4/{STEPS} ", re.M)  # the line of the step at which it is held comes after it is recorded
        sweep.wait(f"start {start}", lambda n=start, at=held: len(at.findall((folder / "log" / "train.log").read_text())) == n)
        assert len(claims.history(folder)) == start
        sweep.hold(5)  # a signal that came before the end would have released the run
        sweep.rank_process(folder, 1).kill()
    sweep.wait_for_end()
    nodes = [c.slurm.node for c in claims.history(folder) if c.slurm]
    assert nodes == [nodes[0]] * 2 + [nodes[2]] * 2
    assert nodes[0] != nodes[2]
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "failed"
    assert "its process died 2 times at step 0 without gaining a step" in result["cause"]
    assert "Killed" in result["cause"]
    out = sweep.run("one", code=1)
    assert "00-depth1-seed42: failed: its process died" in out
    assert "submitted" not in out


def test_jobs_that_cannot_start_end_the_command_with_their_log(sweep: SweepOnSlurm) -> None:
    out = sweep.run("one", "python=/bin/false", code=1)
    assert "jobs end before they start a trial:" in out
    assert "died 4 times in a row, giving up" in out
    assert len(sweep.jobs()) == 1


def test_two_commands_at_once_submit_each_worker_once(sweep: SweepOnSlurm) -> None:
    pair = [sweep.start(*SHORT, "--detach") for _ in range(2)]
    outs = [c.communicate(timeout=200)[0] for c in pair]
    assert [c.returncode for c in pair] == [0, 0], outs
    sweep.wait_for_end()
    for folder in sweep.trial_dirs():
        assert len(claims.history(folder)) == 1
        assert (folder / "log" / "train.log").read_text().count("step 1/") == 1


def test_never_more_than_max_parallel_at_once(sweep: SweepOnSlurm) -> None:
    out = sweep.submit(*SHORT, "max_parallel=1")
    assert "3 workers, 1 at once" in out
    seen, deadline = set(), time.monotonic() + 240
    while sweep.live_jobs() and time.monotonic() < deadline:
        seen.add(sum(j.endswith(":RUNNING") for j in sweep.jobs()))
        time.sleep(0.3)
    assert seen <= {0, 1}
    assert 1 in seen
    assert sweep.status()["counts"]["completed"] == 3


def test_a_sweep_larger_than_the_sites_arrays_is_split_and_keeps_its_throttle(sweep: SweepOnSlurm) -> None:
    sweep.cluster.change(max_array_size=2)
    out = sweep.submit(*SHORT, "max_parallel=2")
    assert "2 workers, 1 at once" in out
    assert "1 workers, 1 at once" in out
    sweep.wait_for_end()
    assert len({j.partition("_")[0] for j in sweep.jobs()}) == 2
    assert all(len(claims.history(d)) == 1 for d in sweep.trial_dirs())
    assert sweep.status()["counts"]["completed"] == 3


def test_cancel_logs_and_a_changed_sweep(sweep: SweepOnSlurm) -> None:
    """Two configurations, one at a time; the running one is cancelled by name, then all; then the sweep grows by one and shrinks again."""
    sweep.hold(20)
    out = sweep.submit("two", "max_parallel=1")
    folder = sweep.wait_for_held(20)
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
    assert "3 workers, 3 at once" in out
    out = sweep.submit("one")
    assert "0 trials added, 2 withdrawn" in out
    assert "2 waiting workers withdrawn" in out
    assert len(sweep.live_jobs()) == 1


@pytest.mark.nightly
def test_preflight_tries_the_runs_folder_on_a_node(sweep: SweepOnSlurm, tmp_path: Path) -> None:
    """The second node refuses hard links: a fake, by a Python of its own."""
    site, folder = tmp_path / "site", tmp_path / "runs"
    site.mkdir()
    refusing = "import os\n\ndef link(*_, **__):\n    raise PermissionError(1, 'Operation not permitted')\n\nos.link = link\n"
    (site / "sitecustomize.py").write_text(refusing)
    there = "by renaming folders, since there are no hard links"
    other = [
        f"problem  shared on the node: all machines must create files in one way; got {there} here, by hard links on this machine: ",
        f"problem  shared: all machines must create files in one way; got by hard links here, {there} on the node: ",
    ]
    for python, status, lines in (([], 0, []), ([f"cluster.python='env PYTHONPATH={site}:{ROOT} {sys.executable}'"], 1, other)):
        line = ["-m", "jobs.preflight", "--cluster", "test_cluster", "--on-node", "--runs-dir", str(folder), *python]
        done = forked.run(line, cwd=ROOT, env=sweep.cluster.environment, timeout=200)
        assert done.returncode == status, done.stdout + done.stderr
        assert f"; {folder} is shared\n" in done.stdout
        assert [problem for problem in lines if problem not in done.stdout] == [], done.stdout
        assert done.stdout.count("\nproblem") == len(lines)
        assert list(folder.iterdir()) == []


@pytest.mark.nightly
def test_a_moved_sweep_goes_on_and_a_copy_leaves_its_original_alone(sweep: SweepOnSlurm) -> None:
    sweep.hold(5)
    sweep.submit("two", "max_parallel=1")
    sweep.wait_for_held(5)
    live = sweep.live_jobs()
    copy, moved = (SweepOnSlurm(sweep.cluster, sweep.runs.with_name(f"{sweep.runs.name}-{name}")) for name in ("copy", "moved"))
    shutil.copytree(sweep.runs, copy.runs)
    assert "2 trials cancelled, 0 jobs ended" in copy.ask("cancel")
    assert (len(live), sweep.live_jobs()) == (2, live)
    assert "2 trials cancelled, 2 jobs ended" in sweep.ask("cancel")
    sweep.wait("no job", lambda: not sweep.live_jobs(), 60)
    sweep.runs.rename(moved.runs)
    for one in (moved, copy):
        one.release()
        one.run("two", "max_parallel=2")
        assert one.status()["counts"]["completed"] == 2
        assert [len(claims.history(d)) for d in one.trial_dirs()] == [2, 1]
        assert "submitted when this folder was" not in one.ask("status")
    assert not sweep.runs.exists()


def test_a_pending_job_runs_the_code_of_its_submission(sweep: SweepOnSlurm, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    for part in ("cnnjepa", "jobs", "sweeps", "slurm", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    names = ",".join(sweep.cluster.names)
    sweep.cluster.run("scontrol", "update", f"nodename={names}", "state=drain", "reason=test")
    environment = {"PYTHONPATH": str(copy)}
    sweep.submit("one", *SHORT, environment=environment, script=copy / "tests" / "support" / "slurm_sweep.py")
    (copy / "cnnjepa" / "train.py").write_text("raise RuntimeError('edited since')\n")
    sweep.cluster.run("scontrol", "update", f"nodename={names}", "state=resume")
    sweep.wait_for_end()
    (folder,) = sweep.trial_dirs()
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    start = claims.history(folder)[0].slurm
    assert start is not None
    assert "edited since" not in (Path(start.code) / "cnnjepa" / "train.py").read_text()


def test_workers_of_a_search_take_one_trial_after_the_other_until_it_is_over(sweep: SweepOnSlurm) -> None:
    searched = SweepOnSlurm(sweep.cluster, sweep.runs)
    searched.path = sweep.runs / "tiny_search-smoke"
    script = ROOT / "tests" / "support" / "tiny_search.py"
    searched.run("--eta", "2", "micro_batch_size=8", "max_parallel=2", script=script, environment={"PYTHONPATH": str(ROOT)})
    owners = [claims.history(d) for d in searched.trial_dirs()]
    assert all(len(past) == 1 for past in owners)  # none was run twice
    jobs = [past[0].slurm.job for past in owners if past[0].slurm]
    assert len(owners) > 8
    assert len(jobs) == len(owners)
    # One that finds nothing to begin ends, and another is added where there is more again: at the end of the configurations, once or twice.
    assert len(set(jobs)) <= 4
    assert max(map(jobs.count, jobs)) >= 3
    counts = searched.status()["counts"]
    assert counts["pruned"] >= 1
    assert counts["pruned"] + counts["completed"] == len(owners)


def test_on_slurm_the_command_that_watches_submits_the_next_round(sweep: SweepOnSlurm) -> None:
    # As a process of its own, whose command line is what it was started with.
    alone = {"PYTHONUNBUFFERED": "1"}
    out = sweep.run("two", "--seeds", "1", "--until-decided", "2", *SHORT, environment=alone)
    assert "not decided after 1 seeds: 2 configurations get a further seed; about 2 further runs are expected, at most 2" in out
    assert out.rstrip().count("not decided after 2 seeds, and no further seed is left to add") == 1
    assert len(sweep.trial_dirs()) == 4
    assert len(sweep.jobs()) >= 2
