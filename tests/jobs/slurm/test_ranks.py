"""A Slurm step's variables in torchrun's words."""

import pytest

from jobs.slurm.ranks import adopt_srun_ranks

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu07",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
}
TOLD = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": str(21000 + (16 * 1000 + 2) % 8000)}


def test_a_task_of_a_step_is_a_rank() -> None:
    environment = dict(STEP)
    adopt_srun_ranks(environment)
    assert environment == {**STEP, **TOLD}


@pytest.mark.parametrize(
    "environment",
    [{}, {**STEP, "RANK": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, {k: v for k, v in STEP.items() if k != "SLURM_PROCID"}],
    ids=["outside", "torchrun", "one task", "no step"],
)
def test_what_is_no_task_among_others_or_has_a_launcher_is_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_srun_ranks(environment)
    assert environment == before


@pytest.mark.parametrize("nodes", ["gpu[07-08]", "gpu07,gpu08", "gpu07", "gpu[07,09-12],cpu1"])
def test_ranks_of_several_nodes_meet_on_the_first(nodes: str) -> None:
    environment = {**STEP, "SLURM_STEP_NODELIST": nodes}
    adopt_srun_ranks(environment)
    assert environment["MASTER_ADDR"] == "gpu07"


def test_steps_that_follow_each_other_and_jobs_beside_each_other_do_not_meet_on_a_port() -> None:
    ports = set()
    for job in range(1000, 1050):
        for step in range(10):
            environment = {**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
            adopt_srun_ranks(environment)
            ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 500
    assert min(ports) >= 21000
    assert max(ports) < 29000
