"""`python -m jobs.pretrain`: one run or a Hydra multirun, alone, under torchrun or under srun."""

import argparse
import hashlib
import logging
import os
import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from cnnjepa.run import skipped, stable
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.identity import DEFAULT_TASK
from cnnjepa.run.ranks import Device, is_main_rank, joined, rank_count
from jobs.cli import INTERRUPTED, Parser, begun, printable, scores_later, stop_on_signals
from jobs.cli import exit_status as status_after
from jobs.cluster import JobSpec, Scheduler
from jobs.config import (
    CONFIG_DIR,
    CONFIG_NAME,
    as_typed,
    comma_explained,
    compose_job,
    job_from,
    override_keys,
    qualified,
    register_schemas,
    split_multirun,
)
from jobs.like import Original, expanded
from jobs.planned import planned
from jobs.private import make_private
from jobs.run import check_jobs, refuse_jobs, run_job
from jobs.scores_text import score_lines
from jobs.slurm.queue import Queue, own_job
from jobs.slurm.ranks import adopt_srun_ranks
from jobs.slurm.sbatch import adapt_submitit, launcher_overrides, unexported
from jobs.slurm.supervisor import KILLED_WITHIN_SECONDS, job_state, requeue
from jobs.task import task_named, task_of


def describe(job: JobSpec, result: RunResult | None) -> str:
    """Return lines that say how a run ended and where it is."""
    if result is None:
        return f"stopped, checkpoint saved: {job.run_dir}\nthe same command resumes it"
    lines = [f"{result.status.name}: {job.run_dir}"]
    lines += [f"  cause: {result.cause}"] if result.cause else []
    if result.skipped_images:
        lines += [f"  {result.skipped_images:,} images cannot be decoded and are left out: {job.run_dir / skipped.NAME}"]
    lines += score_lines(task_of(job.train), result.metrics, result.images)
    lines += [f"  {name} has no value: {cause}" for name, cause in result.missing.items()]
    return printable("\n".join(lines), keep="\n")


def run(job: JobSpec, original: Original | None = None) -> int:
    """Run `job`, print how it ended, and return the exit status; `original` is the run that --like or --weights-from names."""
    task = task_of(job.train)
    task.validate(job.train, rank_count())
    with joined(task.get(job.train, "device", Device.cpu)):  # once: the ranks could not meet a second time
        return _run(job, original)


def _run(job: JobSpec, original: Original | None) -> int:
    job, lines = planned(job)
    lines += [original.line(job)] if original is not None else []
    for line in lines if is_main_rank() else ():
        print(printable(line), flush=True)
    check_jobs([job], rank_count())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if original is not None and is_main_rank() and (step := _begun_with(job, original)):
        print(f"begins with step {step} of {printable(original.named)}, the end of its stable phase", flush=True)
    with stop_on_signals() as should_stop:
        begun()
        result = run_job(job, should_stop)
    if is_main_rank():
        print(describe(job, result), flush=True)
        if result is not None and result.status is RunStatus.failed:
            print("retry_failed=true retries it from its last checkpoint", flush=True)
        elif result is not None and result.missing:
            print(scores_later(Path(job.run_dir)), flush=True)
    return exit_status(result)


def _begun_with(job: JobSpec, original: Original) -> int:
    """Return the step of `original` that the run begins with, or 0 if it starts from scratch."""
    continues = task_of(job.train).continues(job.train, original.config)
    return stable.begin_with(RunFolder(job.run_dir), original.folder) if continues else 0


def exit_status(result: RunResult | None) -> int:
    """Return 130 if the run was stopped, 0 if it completed with all its metrics, otherwise 1."""
    if result is None:
        return INTERRUPTED
    return 0 if result.status is RunStatus.completed and not result.missing else 1


# Exit statuses of this process's runs, which Hydra does not pass on.
_statuses: list[int] = []


def _is_submitits() -> bool:
    """Return whether hydra-submitit-launcher has started this process."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "") == "submitit.core._submit"


@hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base="1.3")
def _hydra_run(config: DictConfig) -> None:
    adopt_srun_ranks()  # in a job of hydra-submitit-launcher, our code starts here
    status = run(job_from(config, task_named(DEFAULT_TASK)))
    _statuses.append(status)
    if status == INTERRUPTED and not _is_submitits():
        sys.exit(INTERRUPTED)  # the rest of a grid is not begun; an allocation around this command is the user's
    if status == INTERRUPTED and os.environ.get("SUBMITIT_EXECUTOR") == "slurm" and (job := own_job()):
        # submitit takes a return for success, and a rank that exits ends the others: requeue first.
        if is_main_rank() and job_state(job) == "RUNNING" and not requeue(job):
            sys.exit(INTERRUPTED)  # Slurm will not end this start of the job
        time.sleep(KILLED_WITHIN_SECONDS)
        sys.exit(INTERRUPTED)


# The run folder already holds what Hydra would write to its own folders.
_QUIET_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def checked_multirun(overrides: list[str]) -> list[JobSpec]:
    """Return the jobs of a multirun; raise ValueError if any of them could not start."""
    if named := [o for o in overrides if o.startswith("task=")]:
        raise ValueError(f"task must be left out with --multirun, which supports only the default task; got {named[0]}: use a sweep")
    own = [o for o in overrides if not o.startswith("hydra")]
    with comma_explained(own):
        found = [planned(compose_job(job)) for job in split_multirun(own)]
        jobs = [job for job, _ in found]
        for line in dict.fromkeys(line for _, lines in found for line in lines):
            print(printable(line), flush=True)
        refuse_jobs([job for job in jobs if job.cluster.scheduler is Scheduler.slurm], elsewhere=True)
        refuse_jobs([job for job in jobs if job.cluster.scheduler is not Scheduler.slurm], rank_count())
    return jobs


def status_of(job: JobSpec) -> int:
    """Return the exit status of a job from its run folder."""
    return exit_status(RunFolder(job.run_dir).result())


def launch(arguments: list[str], jobs: list[JobSpec], launcher: str) -> int:
    """Run a multirun through hydra-submitit-launcher and return the highest exit status."""
    cluster = jobs[0].cluster
    # Two jobs must not train in the same run folders: the same grid gets the same name.
    name = f"cnnjepa-{hashlib.sha256(' '.join(sorted(str(j.run_dir) for j in jobs)).encode()).hexdigest()[:12]}"
    queue = Queue()
    if launcher == "submitit_slurm" and (queued := [e.id for e in queue.named(name) if not e.ended]):
        raise ValueError(f"a grid must be queued only once; got the grid of job {', '.join(queued)} again: wait for it, or scancel it")
    folder = Path(cluster.runs_dir).resolve() / "hydra" / name
    make_private(folder, "the folder of submitit's pickles")
    if launcher == "submitit_slurm":
        if left_out := unexported(cluster):
            print(left_out)
        adapt_submitit()
    sys.argv[1:] = [*arguments, *_QUIET_HYDRA, *launcher_overrides(cluster, launcher, name, folder)]
    try:
        _hydra_run()
    except SystemExit as end:
        if end.code:
            print(f"{launcher} ended with status {end.code}; its logs: {folder}", file=sys.stderr)
            if not any(folder.iterdir()):
                return 1  # nothing was submitted
    queue = Queue()  # the first look was before the jobs were there
    # The launcher stops waiting when a node is lost, although Slurm runs the job again.
    while launcher == "submitit_slurm" and INTERRUPTED in map(status_of, jobs) and any(not e.ended for e in queue.named(name)):
        time.sleep(5)
    for job in jobs:
        print(describe(job, RunFolder(job.run_dir).result()))
    return max(map(status_of, jobs))


def command_line() -> Parser:
    """Return the parser, with the Hydra options that make sense here."""
    examples = """examples:
  python -m jobs.pretrain data=digits epochs=10 optimizer.warmup_epochs=1
  python -m jobs.pretrain -m optimizer.lr=0.001,0.003 epochs=10
  python -m jobs.pretrain --like runs/predictor_ablation-smoke/3 epochs=20"""
    text = "Pretrain one model, or with -m one model per combination of values. Also runs under torchrun or srun."
    parser = Parser(prog="python -m jobs.pretrain", description=text, epilog=examples, keys=override_keys, intermixed=True)
    what = parser.add_argument_group("what to run")
    what.add_argument("overrides", nargs="*", metavar="key=value", help="such as epochs=10, method=simclr or run_dir=runs/mine")
    what.add_argument("-m", "--multirun", action="store_true", help="run every combination of values such as optimizer.lr=0.001,0.003")
    like = "begin from the configuration of that run, SWEEP_FOLDER/TRIAL or a run folder; the overrides change it"
    what.add_argument("--like", metavar="TRIAL", help=like)
    start = "a new run of that run's configuration that starts from the weights of its encoder"
    what.add_argument("--weights-from", metavar="TRIAL", help=start)
    look = parser.add_argument_group("look, and run nothing")
    look.add_argument("-c", "--cfg", choices=["job", "hydra", "all"], help="print the configuration as YAML")
    look.add_argument("--resolve", action="store_true", help="with --cfg: resolve references to other keys")
    look.add_argument("-p", "--package", metavar="KEY", help="with --cfg: print only this part, such as optimizer")
    known = "print what Hydra knows: all, config, defaults, plugins, searchpath"
    look.add_argument("-i", "--info", nargs="?", const="all", metavar="WHAT", help=known)
    look.add_argument("--hydra-help", action="store_true", help="print the help of Hydra, which reads these options")
    return parser


def _hydras_options(asked: argparse.Namespace) -> list[str]:
    """Return the options of `command_line` as Hydra takes them after its overrides."""
    flags = [f"--{name.replace('_', '-')}" for name in ("multirun", "resolve", "hydra_help") if getattr(asked, name)]
    return flags + [f"--{name}={value}" for name in ("cfg", "package", "info") if (value := getattr(asked, name)) is not None]


def main() -> int:
    """Return the exit status: 0 all completed, 1 not all, 2 wrong usage, 130 stopped and saved."""
    return status_after(run_command)


def run_command() -> int:
    """Run the command line; return the exit status. Raise ValueError at wrong usage."""
    adopt_srun_ranks()
    task = task_named(DEFAULT_TASK)
    register_schemas(task)
    typed, original = expanded(sys.argv[1:])
    arguments = qualified(typed)
    flags = [a for a in arguments if a.startswith("-")]
    launcher = next((a.partition("=")[2] for a in arguments if a.startswith("hydra/launcher=")), "basic")
    if not flags:
        return run(compose_job(arguments), original)
    asked = command_line().parse_args(arguments)
    jobs = checked_multirun(asked.overrides) if asked.multirun else []
    for line in [original.line(job) for job in jobs] if original is not None else ():
        print(printable(line), flush=True)
    # Hydra adds what a profile's `sbatch` does not hold yet with ++ alone.
    for_hydra = [f"{'++' * a.startswith('cluster.sbatch.')}{as_typed(a, task, several=asked.multirun)}" for a in asked.overrides]
    if asked.multirun and launcher in ("submitit_slurm", "submitit_local"):
        return launch(["--multirun", *for_hydra], jobs, launcher)
    sys.argv[1:] = [*for_hydra, *_QUIET_HYDRA, *_hydras_options(asked)]  # Hydra takes no override after an option
    _hydra_run()
    return max(_statuses, default=0)


if __name__ == "__main__":
    sys.exit(main())
