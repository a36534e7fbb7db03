"""Conditions of users' shells and sites, each done to a small sweep on the Slurm of tests/support/slurm_cluster.py.

The name and what happens are a line of the table in docs/reference/site-conditions.md; the function makes it happen, and sees that it did.
"""

import contextlib
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sweeps.state import claims
from sweeps.state.submission import Submission
from tests.support.shell import BANNERS, put_banners
from tests.support.site_bench import ONE_CORE, SCRIPT, Site, preempt
from tests.support.slurm_bench import ROOT
from tests.support.slurm_files import NO_REQUEUE


@dataclass(frozen=True)
class Condition:
    """A line of the table."""

    name: str
    happened: str
    play: Callable[[Site], None]
    long: bool  # takes more than some seconds on an idle machine, beside what all take


CONDITIONS: list[Condition] = []


def condition(name: str, happened: str, long: bool = True) -> Callable[[Callable[[Site], None]], Callable[[Site], None]]:
    """Add a line to the table."""

    def add(play: Callable[[Site], None]) -> Callable[[Site], None]:
        CONDITIONS.append(Condition(name, happened, play, long))
        return play

    return add


def starts_of(site: Site) -> list[list[claims.Claim]]:
    """The claims of each trial."""
    return [claims.history(d) for d in site.sweep.trial_dirs()]


def twice(site: Site, *words: str, trials: int = 2) -> str:
    """Type the command, and again while its jobs run or wait: nothing is missing then; return what the first one printed."""
    out = site.type(trials, *words)
    assert "submitted job" in out
    again = site.type(trials, *words)
    assert "submitted job" not in again, again
    return out


def preempted(site: Site, *words: str) -> None:
    """Two trials have begun when an urgent job takes all nodes; they end all the same."""
    site.type(2, "pause_seconds=2.5", *(words or ["partition=gpu-preempt"]))
    site.wait("an epoch", epochs=1)
    preempt(site.cluster)
    site.wait("results", results=2)


def requeued(site: Site) -> None:
    """A job of the sweep was requeued, and took up its trial again."""
    assert any(c.slurm and c.slurm.restart for past in starts_of(site) for c in past)


# Shells.

SHELLS = {
    "`SBATCH_ACCOUNT`, `_PARTITION`, `_QOS`, `_TIMELIMIT`, `_MEM_PER_CPU`": {
        "SBATCH_ACCOUNT": "other", "SBATCH_PARTITION": "other", "SBATCH_QOS": "other", "SBATCH_TIMELIMIT": "1", "SBATCH_MEM_PER_CPU": "7",
    },
    "`SBATCH_ARRAY_INX`, `_JOB_NAME`, `_OUTPUT`, `_WAIT`, `_DEPENDENCY`": {
        "SBATCH_ARRAY_INX": "1-99", "SBATCH_JOB_NAME": "mine", "SBATCH_OUTPUT": "/dev/null", "SBATCH_WAIT": "1",
        "SBATCH_DEPENDENCY": "afterok:1",
    },
    "`SBATCH_EXPORT=NONE`, `SLURM_EXPORT_ENV=NONE`": {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"},
    "`SBATCH_CLUSTERS`, `SLURM_CLUSTERS` of another cluster": {"SBATCH_CLUSTERS": "other", "SLURM_CLUSTERS": "other"},
    "`SQUEUE_FORMAT`, `_STATES`, `_USERS`, `_SORT`, `_PARTITION`": {
        "SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "R", "SQUEUE_USERS": "nobody", "SQUEUE_SORT": "-i", "SQUEUE_PARTITION": "other",
    },
    "`SACCT_FORMAT`, `SINFO_FORMAT`, `SCONTROL_ALL`, `SINFO_PARTITION`": {
        "SACCT_FORMAT": "jobid", "SINFO_FORMAT": "%n", "SCONTROL_ALL": "1", "SINFO_PARTITION": "other", "SACCT_FEDERATION": "1",
    },
    "`SLURM_TIME_FORMAT=relative`, `LC_ALL=de_DE.UTF-8`, `LANG=hu_HU`": {
        "SLURM_TIME_FORMAT": "relative", "LC_ALL": "de_DE.UTF-8", "LANG": "hu_HU", "LANGUAGE": "hu",
    },
    "variables of another job: `SLURM_JOB_ID`, `SLURM_ARRAY_TASK_ID`, `SLURM_NTASKS`": {
        "SLURM_JOB_ID": "7", "SLURM_JOBID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NTASKS": "64",
        "SLURM_MEM_PER_CPU": "1000", "SLURMD_NODENAME": "gpu09", "SRUN_CPUS_PER_TASK": "4", "SLURM_CPUS_PER_TASK": "4",
    },
}  # fmt: skip


def _in_shell(variables: dict[str, str]) -> Callable[[Site], None]:
    def play(site: Site) -> None:
        site.environment |= variables
        twice(site)
        (made,) = Submission.all_of(site.sweep.sweep)
        shown = site.cluster.run("scontrol", "show", "job", made.job)
        for fact in ("Account=proj", "Partition=gpu", "TimeLimit=00:30:00", f"JobName={made.name}", "MinMemoryNode=8000M"):
            assert fact in shown

    return play


for _name, _variables in SHELLS.items():
    condition(_name, "without effect: jobs are as the profile says", long=False)(_in_shell(_variables))


@condition("`SBATCH_NO_REQUEUE=1`, and a preemption", "the profile's `--requeue` holds: saved, requeued, resumed")
def _(site: Site) -> None:
    site.environment["SBATCH_NO_REQUEUE"] = "1"
    preempted(site)
    requeued(site)


@condition("`SCANCEL_STATE`, `SCANCEL_INTERACTIVE`; the sweep is cancelled", "all jobs ended; typed again, the trials go on")
def _(site: Site) -> None:
    site.environment |= {"SCANCEL_STATE": "PENDING", "SCANCEL_INTERACTIVE": "1", "SCANCEL_PARTITION": "other"}
    site.type(2, "pause_seconds=3")
    site.wait("an epoch", epochs=2)
    site.ask("cancel")
    site.cluster.wait("all jobs to end", lambda: not site.sweep.live_jobs(), 40)
    assert site.results() < 2
    site.type(2, "pause_seconds=0.3")


@condition("typed within `salloc --mem-per-cpu`", "jobs are no part of the allocation, and have the profile's memory")
def _(site: Site) -> None:
    _typed_within(site, ["salloc", "--quiet", "--account=proj", "--partition=gpu", "--mem-per-cpu=1000", "--ntasks=1"])


@condition("typed within another batch job", "jobs are no part of it")
def _(site: Site) -> None:
    _typed_within(site, ["sbatch", "--wait", "--account=proj", "--partition=gpu", "--mem=500", f"--output={site.folder}/batch.log"])


def _typed_within(site: Site, outer: list[str]) -> None:
    env = ["env", *(f"{k}={v}" for k, v in site.shell.items() if k in ("PYTHONPATH", "PATH"))]
    line = [*env, *site.sweep.line("--seeds", "2", *ONE_CORE, "--detach", script=SCRIPT)]
    whole = [*outer, *(["--wrap", shlex.join(line)] if outer[0] == "sbatch" else line)]
    subprocess.run(whole, cwd=ROOT, env=site.cluster.environment, capture_output=True, timeout=250, check=True)
    (made,) = Submission.all_of(site.sweep.sweep)
    assert "MinMemoryNode=8000M" in site.cluster.run("scontrol", "show", "job", made.job)


def _under(banner: str) -> Callable[[Site], None]:
    def play(site: Site) -> None:
        site.front.append(put_banners(site.folder / "banner", banner))
        twice(site)
        assert "of 2" in site.ask("status")

    return play


for _banner in BANNERS:
    if _banner != "none":
        _where = {"no text": "that is no text, with zero bytes"}.get(_banner, _banner + (" the output" if " " not in _banner else ""))
        condition(f"a banner around what each client prints: {_where}", "ignored, on the login node and in jobs", long=False)(
            _under(_banner)
        )


@condition("a noisy `BASH_ENV`, which hides `srun` and `python` behind functions", "its text is in the log; the job runs", long=False)
def _(site: Site) -> None:
    noisy = site.folder / "noisy"
    hides = "".join(f"{name}() {{ echo hidden; return 1; }}\n" for name in ("srun", "python", "module", "scontrol"))
    noisy.write_text(f"echo Loading modules\necho a warning >&2\n{hides}")
    site.environment |= {"BASH_ENV": str(noisy), "BASH_FUNC_module%%": "() {  echo hidden; return 1\n}"}
    twice(site)
    site.wait("results", results=2)
    assert "Loading modules" in next((site.sweep.path / "log").glob("*.log")).read_text()


# Who requeues, and who does not.


@condition("`JobRequeue=0`, and a preemption", "saved, requeued, resumed: jobs are submitted with `--requeue`")
def _(site: Site) -> None:
    site.cluster.change(lines={"JobRequeue": "0"}, grace_seconds=0)
    preempted(site)
    requeued(site)


@condition("a submit plugin that forbids requeues, and a preemption", "saved; each job submitted its successor and ended")
def _(site: Site) -> None:
    site.cluster.change(plugin=NO_REQUEUE, grace_seconds=5)
    preempted(site)
    _successors(site)


@condition("`PreemptMode=CANCEL`, and a preemption", "saved; each job submitted its successor and ended")
def _(site: Site) -> None:
    site.cluster.change(preempt_mode="CANCEL", grace_seconds=0)
    preempted(site)
    _successors(site)


def _successors(site: Site) -> None:
    assert all(c.slurm is not None and c.slurm.restart == 0 for past in starts_of(site) for c in past)
    assert len({c.slurm.job for past in starts_of(site) for c in past if c.slurm}) > 2


@condition("`PreemptMode=REQUEUE` without grace, `KillWait=1`", "killed, requeued, resumed from the last epoch")
def _(site: Site) -> None:
    site.cluster.change(grace_seconds=0, kill_wait_seconds=1, user_signal=False)
    preempted(site)
    requeued(site)


@condition("preempted by `SIGTERM` alone", "saved, requeued, resumed")
def _(site: Site) -> None:
    site.cluster.change(grace_seconds=10, user_signal=False)
    preempted(site)
    requeued(site)


@condition("a submit plugin that moves jobs to a preempted partition", "saved, requeued, resumed")
def _(site: Site) -> None:
    # The urgent job has no comment, and stays where it is.
    site.cluster.change(plugin='if job_desc.comment ~= nil then job_desc.partition = "gpu-preempt" end', grace_seconds=5)
    preempted(site, "partition=gpu")
    requeued(site)


@condition("a person requeues a running job (`scontrol requeue`)", "saved, resumed in the same job")
def _(site: Site) -> None:
    site.type(2, "pause_seconds=2.5")
    site.wait("an epoch", epochs=1)
    site.cluster.run("scontrol", "requeue", site.sweep.live_jobs()[0])
    site.wait("results", results=2)
    requeued(site)


@condition("a person suspends a running job and resumes it", "waited for: nobody else took its trial")
def _(site: Site) -> None:
    site.type(2, "pause_seconds=2.5")
    site.wait("an epoch", epochs=1)
    job = site.sweep.live_jobs()[0]
    site.cluster.run("scontrol", "suspend", job)
    assert "submitted job" not in site.type(2, "pause_seconds=2.5")
    assert any(found.endswith(":SUSPENDED") for found in site.sweep.jobs())
    time.sleep(5)
    site.cluster.run("scontrol", "resume", job)
    site.wait("results", results=2)
    assert [len(past) for past in starts_of(site)] == [1, 1]


@condition("a time limit shorter than the run", "saved before the limit, requeued, went on")
def _(site: Site) -> None:
    site.type(1, "time_limit_minutes=2", "pause_seconds=30")
    site.wait("results", results=1, seconds=300)
    assert len(starts_of(site)[0]) > 1


@condition("the same, and a submit plugin that forbids requeues", "saved before the limit; a successor went on")
def _(site: Site) -> None:
    site.cluster.change(plugin=NO_REQUEUE)
    site.type(1, "time_limit_minutes=2", "pause_seconds=30")
    site.wait("results", results=1, seconds=300)
    assert len({c.slurm.job for c in starts_of(site)[0] if c.slurm}) > 1


# Limits.


def _limited(site: Site, limit: int, trials: int) -> None:
    site.cluster.limit(MaxSubmitJobs=limit)
    try:
        _some_fit(site, trials)
    finally:
        site.cluster.limit(MaxSubmitJobs=-1)


def _some_fit(site: Site, trials: int) -> None:
    assert f"of {trials} workers are not submitted yet" in site.type(trials)
    site.wait("results", results=trials)


@condition("`MaxSubmitJobs=1`", "one job, which took one trial after the other", long=False)
def _(site: Site) -> None:
    _limited(site, 1, 2)


@condition("`MaxSubmitJobs=3`", "what fits was submitted; jobs that ended submitted the rest")
def _(site: Site) -> None:
    _limited(site, 3, 5)


@condition("`MaxSubmitJobsPerUser=2` of the QOS", "what fits was submitted; jobs that ended submitted the rest")
def _(site: Site) -> None:
    with qos(site, "MaxSubmitJobsPerUser", "2"):
        _some_fit(site, 4)


@condition("`MaxTRESPerUser=gres/gpu=1` of the QOS", "the others waited, one after the other")
def _(site: Site) -> None:
    with qos(site, "MaxTRESPerUser", "gres/gpu=1"):
        twice(site)
        site.wait("results", results=2)


@contextlib.contextmanager
def qos(site: Site, limit: str, value: str) -> Iterator[None]:
    """Within the block the QOS of all jobs has that limit."""
    change = ["sacctmgr", "-i", "modify", "qos", "normal", "set"]
    site.cluster.run(*change, f"{limit}={value}")
    try:
        yield
    finally:
        site.cluster.run(*change, f"{limit}={'gres/gpu=' if 'gres' in value else ''}-1")


@condition("`MaxJobs=1` of the association", "the others waited, one after the other")
def _(site: Site) -> None:
    site.cluster.limit(MaxJobs=1)
    try:
        twice(site)
        site.wait("results", results=2)
    finally:
        site.cluster.limit(MaxJobs=-1)


@condition("`max_queued=2` in the profile, `MaxArraySize=1`", "two single jobs; jobs that ended submitted the rest", long=False)
def _(site: Site) -> None:
    site.cluster.change(max_array_size=1)
    out = site.type(4, "max_queued=2")
    assert "of 4 workers are not submitted yet" in out


@condition("`MaxArraySize=1`", "single jobs", long=False)
def _(site: Site) -> None:
    site.cluster.change(max_array_size=1)
    twice(site)
    assert [s.throttle for s in Submission.all_of(site.sweep.sweep)] == [0, 0]


@condition(
    "`MaxArraySize=0`, `MaxSubmitJobs=3`, no requeue, `PreemptMode=CANCEL`, a preemption",
    "single jobs; another one took the trial of one that was cancelled",
)
def _(site: Site) -> None:
    site.cluster.change(max_array_size=0, plugin=NO_REQUEUE, preempt_mode="CANCEL", grace_seconds=0)
    site.cluster.limit(MaxSubmitJobs=3)
    try:
        site.type(4, "partition=gpu-preempt", "pause_seconds=2.5")
        site.wait("an epoch", epochs=1)
        site.cluster.limit(MaxSubmitJobs=6)
        # The controller hears of a new limit some time later.
        site.cluster.wait("the urgent job", lambda: preempt(site.cluster), 30)
        site.cluster.limit(MaxSubmitJobs=3)
        site.wait("results", results=4)
    finally:
        site.cluster.limit(MaxSubmitJobs=-1)
    assert any(len(past) > 1 for past in starts_of(site)), "none was preempted"
