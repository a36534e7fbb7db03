"""Render workers as a Slurm job array, and submit it through submitit.

submitit's pickles are not used: if the submitter died after sbatch but before writing them, every
job would fail. The sweep folder holds what a job needs before it is submitted.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from jobs.cluster import ClusterProfile
from jobs.private import refuse_unless_private
from jobs.slurm.queue import SlurmError

_SBATCH_TIMEOUT_SECONDS = 60
# Slurm's megabytes are 2^20 bytes. With 1000 of them per GB, a request never exceeds the node.
_MB_A_GB = 1000


@dataclass(frozen=True)
class Array:
    """One job array. Each task runs `module` on every rank, or `script` once on its first node."""

    name: str
    size: int
    throttle: int  # tasks at once
    module: str
    argument: str
    code: Path  # the snapshot that it runs
    log_folder: Path
    comment: str = ""
    after: Sequence[str] = ()  # arrays that must end before this one starts
    # Bash script of the snapshot, which starts its own steps; gets `argument` and Python's words.
    script: str = ""
    nodes: str = ""  # folder in which faults of nodes are recorded; "": none are


class _Executor(SlurmExecutor):
    """Renders and submits a plain command. Rendering needs no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["timeout", str(_SBATCH_TIMEOUT_SECONDS), "sbatch", str(submission_file_path)]


def _supervisor(cluster: ClusterProfile, array: Array, python: str) -> list[str]:
    nodes = ["--nodes", array.nodes] if array.nodes else []
    return [python, "-u", "-m", "jobs.slurm.supervisor", "--stop-signal-seconds", str(cluster.stop_signal_seconds), *nodes]


def _leaving(cluster: ClusterProfile, array: Array, python: str) -> list[str]:
    """Return the shell lines that move the job to another node if its setup ends it."""
    if not array.nodes:
        return []
    words, code = shlex.join(_supervisor(cluster, array, python)), shlex.quote(str(array.code))
    return [
        f"setup_failed() {{ local status=$?; cd {code} && PYTHONPATH={code} {words} --setup-failed $status; }}",
        "trap setup_failed EXIT",
    ]


def _command(cluster: ClusterProfile, array: Array, python: str) -> str:
    words = shlex.split(cluster.python) or [python]
    # Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
    srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", f"--cpus-per-task={cluster.threads_per_rank}"]
    rank = [*words, "-u", "-m", array.module, array.argument]
    supervisor = [*_supervisor(cluster, array, python), "--"]
    run = [["bash", str(array.code / array.script), array.argument], words] if array.script else [srun, rank]
    return " \\\n    ".join(map(shlex.join, [supervisor, *run]))


def _site_options(cluster: ClusterProfile) -> dict[str, str]:
    """Return the options that a site may require; "" stands for the site's default."""
    gres = cluster.gres or (f"gpu:{cluster.gpus_per_node}" if cluster.gpus_per_node else "")
    return {"account": cluster.account, "partition": cluster.partition, "qos": cluster.qos, "gres": gres}


def _memory_mb(cluster: ClusterProfile) -> int:
    """Return the memory of one node."""
    return int(cluster.memory_gb_per_trial * _MB_A_GB / cluster.nodes_per_trial)


def _executor(cluster: ClusterProfile, array: Array, python: str) -> _Executor:
    executor = _Executor(folder=array.log_folder)
    code = shlex.quote(str(array.code))
    options = {
        "requeue": True,
        "output": str(array.log_folder).replace("%", "%%") + "/%A_%a.log",
        **({"dependency": "afterany:" + ":".join(array.after)} if array.after else {}),
        **cluster.sbatch,
    }
    optional = {**_site_options(cluster), "comment": array.comment}
    executor.update_parameters(
        job_name=array.name,
        time=cluster.time_limit_minutes,
        nodes=cluster.nodes_per_trial,
        ntasks_per_node=cluster.ranks_per_trial // cluster.nodes_per_trial,
        cpus_per_task=cluster.threads_per_rank,
        mem=f"{_memory_mb(cluster)}M",
        signal_delay_s=cluster.stop_signal_seconds,
        setup=[
            *_leaving(cluster, array, python),
            *cluster.setup,
            f"export OMP_NUM_THREADS={cluster.threads_per_rank}",
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"cd {code} || exit 1",
            *(["trap - EXIT"] if array.nodes else []),
        ],
        array_parallelism=array.throttle,
        stderr_to_stdout=True,
        use_srun=False,  # the supervisor starts it
        wckey=None,
        additional_parameters=options,
        **{key: value for key, value in optional.items() if value},
    )
    executor.parameters["map_count"] = array.size
    return executor


def render(cluster: ClusterProfile, array: Array, python: str = sys.executable) -> str:
    """Return the exact batch script that `submit` passes to sbatch. Needs no Slurm."""
    return _executor(cluster, array, python)._make_submission_file_text(_command(cluster, array, python), "")


def launcher_overrides(cluster: ClusterProfile, launcher: str, name: str, folder: Path) -> list[str]:
    """Return the profile as Hydra overrides for `launcher` (submitit_slurm or submitit_local)."""
    values: dict[str, Any] = {"name": name, "timeout_min": cluster.time_limit_minutes, "cpus_per_task": cluster.threads_per_rank}
    if launcher == "submitit_slurm":
        values |= {
            "nodes": cluster.nodes_per_trial,
            "tasks_per_node": cluster.ranks_per_trial // cluster.nodes_per_trial,
            "mem_gb": int(_memory_mb(cluster) // 1024),
            **{key: value or None for key, value in _site_options(cluster).items()},
            "signal_delay_s": cluster.stop_signal_seconds,
            "array_parallelism": cluster.max_parallel or 256,
            "max_num_timeout": 1000,  # a run that exceeds the limit goes on in the next job
            "stderr_to_stdout": True,
            # The launcher cannot set srun's options.
            "setup": [
                refuse_unless_private(folder),
                *cluster.setup,
                "export SLURM_KILL_BAD_EXIT=1",
                f"export SRUN_CPUS_PER_TASK={cluster.threads_per_rank}",
            ],
        }
    shown = [f"hydra.launcher.{key}={_hydra_value(value)}" for key, value in values.items()]
    further = {"requeue": True, **cluster.sbatch} if launcher == "submitit_slurm" else {}
    shown += [f"++hydra.launcher.additional_parameters.{key}={_hydra_value(value)}" for key, value in further.items()]
    return [f"hydra.sweep.dir={_hydra_value(str(folder))}", *shown]


def _hydra_value(value: object) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("${", "\\${")


def submit(cluster: ClusterProfile, array: Array) -> str:
    """Submit `array` and return its job ID; raise SlurmError with sbatch's message.

    The job may exist even so, if sbatch's answer was lost. Look for its name before trying again.
    """
    array.log_folder.mkdir(parents=True, exist_ok=True)
    try:
        job = _executor(cluster, array, sys.executable)._submit_command(_command(cluster, array, sys.executable))
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch: {' '.join(str(error.__cause__ or error).split())}") from error
    return str(job.job_id)
