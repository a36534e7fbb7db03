"""`python -m jobs.pretrain [-m] [key=value ...]`: one run, or a Hydra multirun; alone, under torchrun or under srun."""

import logging
import sys

import hydra
from omegaconf import DictConfig

from cnnjepa.distributed import is_main_rank, rank_count
from cnnjepa.runs import RunResult, RunStatus
from jobs.compose import CONFIG_DIR, CONFIG_NAME, compose_job, job_from, register_schemas, split_multirun
from jobs.door import INTERRUPTED, stop_on_signals
from jobs.ranks import adopt_srun_ranks
from jobs.run import check_job, run_job
from jobs.spec import JobSpec


def describe(job: JobSpec, result: RunResult | None) -> str:
    """Lines that say how a run ended and where it is."""
    if result is None:
        return f"stopped, checkpoint saved: {job.run_dir}\nthe same command resumes it"
    lines = [f"{result.status.name}: {job.run_dir}"]
    lines += [f"  cause: {result.cause}"] if result.cause else []
    lines += [f"  {name} = {value:.2f}" for name, value in result.metrics.items()]
    lines += [f"  {name} has no value: {cause}" for name, cause in result.missing.items()]
    return "\n".join(lines)


def run(job: JobSpec) -> int:
    """Run `job` and say how it ended; returns the exit status."""
    check_job(job, rank_count())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with stop_on_signals() as should_stop:
        result = run_job(job, should_stop)
    if is_main_rank():
        print(describe(job, result), flush=True)
        if result is not None and result.status is RunStatus.failed:
            print("retry_failed=true tries it again from its last checkpoint", flush=True)
    if result is None:
        return INTERRUPTED
    return 0 if result.status is RunStatus.completed and not result.missing else 1


# Statuses of the runs of this process: Hydra hands none of them on, and ends a multirun at the first error.
_statuses: list[int] = []


@hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base="1.3")
def _hydra_run(config: DictConfig) -> None:
    _statuses.append(run(job_from(config)))


# Hydra's own folders would hold a second copy of what the run folder holds.
_QUIET_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def check_multirun(overrides: list[str]) -> None:
    """Raise ValueError where any run of a multirun could not start."""
    for job in split_multirun([o for o in overrides if not o.startswith("hydra")]):
        check_job(compose_job(job), rank_count())


def main() -> int:
    """The door; exit status 0 completed, 1 failed or a probe without value, 2 wrong usage, 130 stopped and saved."""
    adopt_srun_ranks()
    register_schemas()
    arguments = sys.argv[1:]
    flags = [a for a in arguments if a.startswith("-")]
    try:
        if not flags:
            return run(compose_job(arguments))
        if {"-m", "--multirun"} & set(flags):
            check_multirun([a for a in arguments if a not in flags])
        sys.argv[1:] = [*arguments, *_QUIET_HYDRA]
        _hydra_run()
        return max(_statuses, default=0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
