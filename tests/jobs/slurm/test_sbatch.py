"""The batch scripts, to the letter; rendering needs no Slurm."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cluster import Allocation, ClusterProfile, Scheduler
from jobs.config import cluster_names, compose_job
from jobs.slurm.queue import SlurmError
from jobs.slurm.sbatch import Array, render, submit

GOLDEN = Path(__file__).parent / "golden"
NAMES = [n for n in cluster_names() if n != "local"]


def profile(name: str) -> ClusterProfile:
    return compose_job([f"cluster={name}", "account=abc"]).cluster


def array(throttle: int = 8, **changes: object) -> Array:
    made = Array(
        "sweep-1", 33, throttle, "sweeps.execution.worker_main", "/runs/submissions/000001.json", Path("/runs/code/1"), Path("/runs/log")
    )
    return replace(made, **changes)


def lines(cluster: ClusterProfile, **changes: object) -> list[str]:
    return render(cluster, array(**changes), python="/venv/bin/python").splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_the_script_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch, no srun
    cluster = profile(name)
    assert (cluster.name, cluster.scheduler) == (name, Scheduler.slurm)
    golden = (GOLDEN / f"{name}.sh").read_text().splitlines()
    assert lines(cluster, throttle=cluster.max_parallel) == golden


def test_every_golden_script_has_its_profile() -> None:
    assert sorted(p.stem for p in GOLDEN.iterdir()) == sorted([*NAMES, "komondor_ray"])


def test_the_script_of_an_allocation_is_the_golden_one() -> None:
    cluster = profile("komondor")
    whole = Allocation.of(cluster, 3, None).whole(cluster)
    golden = (GOLDEN / "komondor_ray.sh").read_text().splitlines()
    assert lines(whole, size=1, throttle=1, script="slurm/ray_cluster.sbatch") == golden


def test_a_container_starts_ray_and_not_its_script() -> None:
    cluster = replace(profile("test_cluster"), python="singularity exec --nv image.sif python")
    shown = lines(Allocation.of(cluster, 2, 8 // 2).whole(cluster), script="slurm/ray_cluster.sbatch")
    assert shown[-2].strip() == "bash /runs/code/1/slurm/ray_cluster.sbatch /runs/submissions/000001.json \\"
    assert shown[-1].strip() == "singularity exec --nv image.sif python"


@pytest.mark.parametrize(
    ("workers_per_node", "cores", "gpus", "memory"),
    [(None, 16, 1.0, 64.0), (4, 16, 1.0, 64.0), (12, 5, 0.3333, 256 / 12), (64, 1, 0.0625, 4.0)],
)
def test_a_worker_has_its_part_of_a_node(workers_per_node: int | None, cores: int, gpus: float, memory: float) -> None:
    cluster = profile("komondor")
    allocation = Allocation.of(cluster, 3, workers_per_node)
    worker = allocation.part(cluster)
    assert (worker.cores_per_trial, worker.gpus_per_trial, worker.memory_gb_per_trial) == (cores, gpus, memory)
    assert (worker.nodes_per_trial, worker.ranks_per_trial, worker.max_parallel) == (1, 1, 3 * (workers_per_node or 4))
    assert round(worker.gpus_per_trial * 10_000) * (allocation.workers_per_node // 4) <= 10_000, "Ray counts so, and has to place them all"


def test_a_node_of_an_allocation_is_one_of_a_worker_of_several() -> None:
    cluster = replace(
        profile("komondor"), nodes_per_trial=2, ranks_per_trial=8, cores_per_trial=128, gpus_per_trial=8.0, memory_gb_per_trial=512.0
    )
    shown = lines(Allocation.of(cluster, 3, None).whole(cluster))
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=64", "#SBATCH --gres=gpu:4"} <= set(shown)
    assert "#SBATCH --mem=256000M" in shown


def test_without_gpus_a_worker_is_a_core() -> None:
    cluster = replace(profile("test_cluster"), gpus_per_trial=0.0, gres="")
    allocation = Allocation.of(cluster, 2, None)
    assert (allocation.workers, allocation.part(cluster).cores_per_trial, allocation.part(cluster).gpus_per_trial) == (8, 1, 0.0)


def test_gpus_are_asked_for_by_gres_and_none_where_there_are_none() -> None:
    cluster = profile("test_cluster")
    assert "#SBATCH --gres=gpu:2" in lines(replace(cluster, gres="", gpus_per_trial=2.0))
    assert not [x for x in lines(replace(cluster, gres="", gpus_per_trial=0.0)) if "gres" in x]


def test_what_a_profile_leaves_open_is_left_to_the_site() -> None:
    bare = replace(profile("test_cluster"), account="", partition="", qos="")
    assert not [x for x in lines(bare) if "account" in x or "partition" in x or "qos" in x]


def test_further_sbatch_options_and_a_dependency() -> None:
    shown = lines(replace(profile("test_cluster"), sbatch={"constraint": "a100", "exclude": "node7"}), after=("12", "13"))
    assert {"#SBATCH --constraint=a100", "#SBATCH --exclude=node7", "#SBATCH --dependency=afterany:12:13"} <= set(shown)


def test_a_percent_sign_in_a_folders_name_is_none_of_slurms() -> None:
    shown = lines(profile("test_cluster"), log_folder=Path("/runs/100%j/log"))
    assert "#SBATCH --output=/runs/100%%j/log/%A_%a.log" in shown


def test_a_container_starts_the_ranks_and_not_the_supervisor() -> None:
    shown = lines(replace(profile("test_cluster"), python="singularity exec --nv image.sif python"))
    assert shown[-3].startswith("/venv/bin/python -u -m jobs.slurm.supervisor")
    assert shown[-1].strip().startswith("singularity exec --nv image.sif python -u -m sweeps.execution.worker_main")


def test_two_nodes_share_ranks_and_memory() -> None:
    shown = lines(replace(profile("komondor"), nodes_per_trial=2, ranks_per_trial=8, cores_per_trial=128, gpus_per_trial=8.0))
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=16", "#SBATCH --mem=128000M"} <= set(shown)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2; echo 'sbatch: error: refused, and why' >&2; exit 1", "AssocMaxSubmitJobLimit"),
        ("echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1", "Unable to contact slurm controller"),
        ("exit 124", "exit status 124"),
        ("true", "must print the number of the job"),
    ],
)
def test_a_refusal_has_sbatchs_own_words(script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:/usr/bin:/bin")
    with pytest.raises(SlurmError, match=said) as refused:
        submit(profile("test_cluster"), array(code=tmp_path, log_folder=tmp_path / "log"))
    assert str(refused.value).startswith("sbatch: ")


@pytest.mark.parametrize(
    ("setup", "status", "words"),
    [
        (["true", "exit 3"], 3, "--setup-failed 3"),
        (["set -e", "false", "exit 5"], 1, "--setup-failed 1"),
        (["false"], 0, "-- srun"),  # a line that fails and does not end the script is the user's business
        ([], 0, "-- srun"),
    ],
)
def test_a_setup_that_ends_the_script_is_told_to_the_supervisor(tmp_path: Path, setup: list[str], status: int, words: str) -> None:
    code, python, said = tmp_path / "co de", tmp_path / "python", tmp_path / "said"
    code.mkdir()
    python.write_text(f'#!/bin/bash\necho "$PWD: $*" >>{said}\n')
    python.chmod(0o755)
    cluster = replace(profile("test_cluster"), setup=setup)
    text = render(cluster, array(code=code, nodes=str(tmp_path / "nodes")), python=str(python))
    assert subprocess.run(["bash", "-c", text], cwd=tmp_path, check=False).returncode == status
    (line,) = said.read_text().splitlines()
    assert line.startswith(f"{code}: -u -m jobs.slurm.supervisor --stop-signal-seconds 20 --nodes {tmp_path / 'nodes'} {words}")
