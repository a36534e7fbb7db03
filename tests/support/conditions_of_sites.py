"""More conditions of tests/support/conditions.py: what Slurm answers, nodes that fail, and folders."""

import hashlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil

from tests.support.bad_node import broken_at_start
from tests.support.conditions import CONDITIONS, condition, starts_of, twice
from tests.support.site_bench import Site, flaky_path, quick_sweep
from tests.support.slurm_cluster import SlurmCluster

ABSENT = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
NO_MEM = """
    if job_desc.min_mem_per_node ~= nil then
        slurm.log_user("--mem is not permitted here, use --mem-per-cpu")
        return slurm.ERROR
    end
"""
TYPED = """
    if job_desc.tres_per_node ~= nil and not string.find(job_desc.tres_per_node, "a100") then
        slurm.log_user("the type of GPU must be given")
        return slurm.ERROR
    end
"""


# What Slurm answers.


@condition("no accounting", "not needed")
def _(site: Site) -> None:
    nothing = dict.fromkeys(["AccountingStorageEnforce", "AccountingStorageTRES", "AccountingStorageHost", "AccountingStoragePass"], "")
    site.cluster.change(lines={"AccountingStorageType": "accounting_storage/none", **nothing})
    twice(site)


@condition("the accounting daemon is down", "not needed: the controller knows")
def _(site: Site) -> None:
    site.cluster.stop_accounting()
    try:
        twice(site)
        site.wait("results", results=2)
    finally:
        site.cluster.start_accounting()


@condition("`sacct` takes 20 s, and the controller forgets jobs after 2 s (`MinJobAge`)", "waited for")
def _(site: Site) -> None:
    site.cluster.change(lines={"MinJobAge": "2"})
    site.wrap("sacct", "sleep 20")
    twice(site)
    site.wait("results", results=2)
    time.sleep(4)  # until the controller has forgotten them
    assert "submitted job" not in site.type(2)


@condition("`squeue` answers nothing for a while, with exit status 0", "proves nothing: nothing was submitted twice")
def _(site: Site) -> None:
    flag = site.folder / "empty"
    site.wrap("squeue", f"[ -e {flag} ] && exit 0")
    site.type(2, "pause_seconds=3")
    site.wait("an epoch of each", epochs=2)
    flag.touch()
    threading.Timer(15, flag.unlink).start()
    assert "submitted job" not in site.type(2, "pause_seconds=3")


@condition("`sbatch` cannot reach the controller for 5 s", "tried again, submitted once")
def _(site: Site) -> None:
    flag = site.folder / "absent"
    flag.touch()
    site.wrap("sbatch", f'if [ -e {flag} ] && [[ "$*" != *--test-only* ]]; then echo "{ABSENT}" >&2; exit 1; fi')
    threading.Timer(5, flag.unlink).start()
    assert site.type(2).count("submitted job") == 1


@condition("`sbatch` submits, but its answer is lost", "found by its name, submitted once", long=False)
def _(site: Site) -> None:
    flag = site.folder / "lost"
    flag.touch()
    lost = f'if [ -e {flag} ] && [[ "$*" != *--test-only* ]]; then rm {flag}; "$real" "$@" >/dev/null; echo "{LOST}" >&2; exit 1; fi'
    site.wrap("sbatch", lost)
    site.type(2)
    assert not flag.exists()


@condition("the controller is away while the command is typed", "waited for, submitted once")
def _(site: Site) -> None:
    site.cluster.stop_controller()
    threading.Timer(8, site.cluster.start_controller).start()
    assert site.type(2).count("submitted job") == 1


@condition("the controller is away for 15 s while jobs run and end", "waited for")
def _(site: Site) -> None:
    site.type(2)
    site.wait("an epoch", epochs=1)
    site.cluster.stop_controller()
    time.sleep(15)
    site.cluster.start_controller()


@condition("30 % of all calls fail, come late or empty, or in another language", "asked again")
def _(site: Site) -> None:
    path = flaky_path(site.cluster, site.folder / "flaky", "3")
    site.front.append(Path(path.partition(":")[0]))
    twice(site)


# Options that a site forbids or wants.


@condition("a submit plugin that forbids `--mem`; then `sbatch.mem=null`", "refused in one line, exit status 2; then submitted")
def _(site: Site) -> None:
    site.cluster.change(plugin=NO_MEM)
    out = site.type(2, code=2)
    assert "--mem is not permitted here" in out
    site.type(2, "sbatch.mem=null")


@condition("the same, with `sbatch.mem-per-cpu=1G`", "submitted", long=False)
def _(site: Site) -> None:
    site.cluster.change(plugin=NO_MEM)
    twice(site, "sbatch.mem-per-cpu=1G")


@condition("GPUs must be typed: `gres=gpu:a100:1`", "submitted", long=False)
def _(site: Site) -> None:
    site.cluster.change(plugin=TYPED)
    twice(site, "gres=gpu:a100:1")


@condition("the same, with `sbatch.gpus-per-node=a100:1`", "submitted", long=False)
def _(site: Site) -> None:
    site.cluster.change(plugin=TYPED)
    twice(site, "sbatch.gpus-per-node=a100:1")


@condition("nodes are given as a whole (`OverSubscribe=EXCLUSIVE`)", "three at once, the fourth waited")
def _(site: Site) -> None:
    site.cluster.change(partitions="OverSubscribe=EXCLUSIVE")
    twice(site, trials=4)
    site.wait("results", results=4)
    assert len({c.slurm.node for past in starts_of(site) for c in past if c.slurm}) > 1


@condition("a submit plugin that cuts the time limit to two minutes", "saved before the limit, requeued, went on")
def _(site: Site) -> None:
    site.cluster.change(plugin="job_desc.time_limit = 2")
    site.type(1, "pause_seconds=30")
    site.wait("results", results=1, seconds=300)


# Partitions and nodes.


def _update(cluster: SlurmCluster, *words: str) -> None:
    cluster.run("scontrol", "update", *words)


@condition("a partition that is down for a while", "jobs waited; status said why")
def _(site: Site) -> None:
    _update(site.cluster, "partitionname=gpu", "state=down")
    try:
        twice(site)
        assert "PartitionDown" in site.ask("status")
    finally:
        _update(site.cluster, "partitionname=gpu", "state=up")


@condition("a partition that takes no jobs (`INACTIVE`) for a while", "refused, exit status 2; submitted when typed later")
def _(site: Site) -> None:
    _update(site.cluster, "partitionname=gpu", "state=inactive")
    try:
        site.type(2, code=2)
    finally:
        _update(site.cluster, "partitionname=gpu", "state=up")
    site.type(2)


@condition("a node is drained while a trial runs there", "the trial ended there; the others went elsewhere")
def _(site: Site) -> None:
    site.cluster.change(partitions="OverSubscribe=EXCLUSIVE")
    site.type(4, "pause_seconds=1")
    site.wait("an epoch", epochs=1)
    _update(site.cluster, "nodename=gpu01", "state=drain", "reason=test")
    site.wait("results", results=4)


@condition("a node loses power", "requeued by Slurm to another node, resumed")
def _(site: Site) -> None:
    _power_cut(site)
    assert any(c.slurm and c.slurm.restart for past in starts_of(site) for c in past)


@condition("a node loses power, and a submit plugin forbids requeues", "another job that ended submitted a successor")
def _(site: Site) -> None:
    site.cluster.change(plugin="job_desc.requeue = 0")
    _power_cut(site)


def _power_cut(site: Site) -> None:
    site.cluster.change(partitions="OverSubscribe=EXCLUSIVE")
    # The fourth trial waits for a node, and ends after Slurm has noticed.
    site.type(4, "pause_seconds=4")
    site.wait("an epoch of each", epochs=3)
    site.cluster.kill_node("gpu02")
    site.wait("results", results=4)


@condition("the Slurm daemon of a node dies, and its jobs live on", "one owner at a time; the trial resumed elsewhere")
def _(site: Site) -> None:
    site.cluster.change(partitions="OverSubscribe=EXCLUSIVE")
    site.type(3, "pause_seconds=4")
    site.wait("an epoch of each", epochs=3)
    for pid in site.cluster.processes_of_node("gpu02"):
        if psutil.Process(pid).name() == "slurmd":
            os.kill(pid, signal.SIGKILL)
    site.wait("results", results=3)


@condition("a node breaks whatever computes there, with an unknown error", "named and avoided; no trial pays for it")
def _(site: Site) -> None:
    site.at_start(broken_at_start())
    site.type(2, "pause_seconds=0.5")
    site.wait("results", results=2)
    assert list(site.sweep.sweep.nodes.avoided()) == ["gpu01"]
    assert 1 <= sum(c.slurm is not None and c.slurm.node == "gpu01" for past in starts_of(site) for c in past) <= 2


@condition("the setup fails on one node", "named and avoided; the jobs moved")
def _(site: Site) -> None:
    site.type(2, 'cluster.setup=["[ $SLURMD_NODENAME != gpu01 ] || exit 3"]')
    site.wait("results", results=2)
    assert list(site.sweep.sweep.nodes.avoided()) == ["gpu01"]


def _prolog(site: Site, scheduler: str = "") -> None:
    script = site.folder / "prolog"
    script.write_text('#!/bin/bash\n[ "$SLURMD_NODENAME" != gpu01 ]\n')
    script.chmod(0o755)
    parameters = "bf_interval=1,sched_interval=2,sched_min_interval=0" + scheduler
    site.cluster.change(lines={"Prolog": str(script), "SchedulerParameters": parameters})


@condition("the prolog fails on one node (`nohold_on_prolog_fail`)", "Slurm drained it and requeued the jobs")
def _(site: Site) -> None:
    _prolog(site, ",nohold_on_prolog_fail")
    site.type(2)
    site.wait("results", results=2)


@condition("the prolog fails on one node, and Slurm holds the jobs", "status named the command that releases them; typed, they ran")
def _(site: Site) -> None:
    _prolog(site)
    site.type(2)
    site.cluster.wait("jobs that are held", lambda: "to release: scontrol release" in site.ask("status"), 60)
    line = next(line for line in site.ask("status").replace("\n", " ").split("to release: ")[1:])
    _release(site, line)


def _release(site: Site, line: str) -> None:
    words = line.split()[:3]
    assert words[:2] == ["scontrol", "release"]
    site.cluster.run(*words)


# Folders.


@condition("the sweep folder is moved between two commands", "goes on at the new place")
def _(site: Site) -> None:
    site.type(2)
    site.sweep.wait_for_end()
    shutil.move(site.sweep.runs, site.folder / "moved")
    site.sweep = quick_sweep(site.cluster, site.folder / "moved")
    site.type(3)
    site.wait("results", results=3)


@condition("the sweep folder is copied, and the copy goes on", "nothing was written into its original")
def _(site: Site) -> None:
    site.type(2)
    site.sweep.wait_for_end()
    original = site.sweep.runs
    before = _digest(original)
    shutil.copytree(original, site.folder / "copy", symlinks=True)
    site.sweep = quick_sweep(site.cluster, site.folder / "copy")
    site.type(3)
    site.wait("results", results=3)
    assert _digest(original) == before


def _digest(folder: Path) -> str:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


NO_LINKS = """
import errno, os
def refused(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
os.link = refused
"""
NO_LOCKS = """
import errno, fcntl, os
def refused(*_, **__):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = fcntl.lockf = refused
"""


@condition("a runs folder without hard links", "claims are made in another way", long=False)
def _(site: Site) -> None:
    site.at_start(NO_LINKS)
    twice(site)


@condition("a runs folder without file locks", "none are needed", long=False)
def _(site: Site) -> None:
    site.at_start(NO_LOCKS)
    twice(site)


__all__ = ["CONDITIONS"]
