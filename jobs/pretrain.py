"""`python -m jobs.pretrain [-m] [key=value ...]`: one run, or a Hydra multirun; alone, under torchrun or under srun."""

import logging
import sys

import hydra
from omegaconf import DictConfig

from cnnjepa.distributed import is_main_rank, rank_count
from cnnjepa.runs import RunResult, RunStatus
from jobs.compose import CONFIG_DIR, CONFIG_NAME, compose_job, job_from, register_schemas, split_multirun
from jobs.ranks import adopt_srun_ranks
from jobs.run import check_job, run_job, stop_on_signals
from jobs.spec import JobSpec

INTERRUPTED = 130


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
    if result is None:
        return INTERRUPTED
    return 0 if result.status is RunStatus.completed and not result.missing else 1


@hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base="1.3")
def _hydra_run(config: DictConfig) -> int:
    status = run(job_from(config))
    if status:
        sys.exit(status)
    return status


# Hydra's own folders would hold a second copy of what the run folder holds.
_QUIET_HYDRA = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


def main() -> int:
    """The door; exit status 0 completed, 1 failed or a probe without value, 2 wrong usage, 130 stopped and saved."""
    adopt_srun_ranks()
    register_schemas()
    arguments = sys.argv[1:]
    try:
        if {"-m", "--multirun"} & set(arguments):
            for overrides in split_multirun([a for a in arguments if not a.startswith(("-", "hydra"))]):
                compose_job(overrides)
        if any(a.startswith("-") for a in arguments):
            sys.argv[1:] = [*arguments, *_QUIET_HYDRA]
            _hydra_run()
            return 0
        return run(compose_job(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
