"""Render workers as a Slurm job array through submitit, and submit it.

submitit's pickles are not used: if the submitter died after sbatch but before writing them, every
job would fail. The sweep folder holds what a job needs before it is submitted.
"""

import json
import re
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.slurm.slurm import SlurmInfoWatcher

from cnnjepa.run.files import write_atomic
from jobs.cluster import ClusterProfile
from jobs.private import refuse_unless_private
from jobs.slurm import clients
from jobs.slurm.queue import SlurmError, ask

# Slurm's megabytes are 2^20 bytes. With 1000 of them per GB, a request never exceeds the node.
_MB_A_GB = 1000
# Options that the profile's `sbatch` replaces: sbatch takes one of them.
_REPLACED_BY = {
    "mem": ("mem_per_cpu", "mem_per_gpu"),
    "gres": ("gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket"),
    "requeue": ("no_requeue",),
}
# srun would pass on only what sbatch's --export names, and nothing that the script sets.
_ALL_TO_STEPS = "export SLURM_EXPORT_ENV=ALL"


@dataclass(frozen=True)
class Array:
    """One job array. Each task runs `module` on every rank, or `script` once on its first node."""

    name: str
    size: int
    throttle: int  # tasks at once; 0 if it is a single job and no array
    module: str
    argument: str
    code: Path  # the snapshot that it runs
    log_folder: Path
    comment: str = ""
    after: Sequence[str] = ()  # arrays that must end before this one starts
    # Bash script of the snapshot, which starts its own steps; gets `argument` and Python's words.
    script: str = ""
    successor: str = ""  # module that is called with `argument` to submit what a job leaves to do
    nodes: str = ""  # folder in which faults of nodes are recorded; "": none are


class _Executor(SlurmExecutor):
    """Renders a plain command. Rendering needs no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _supervisor(cluster: ClusterProfile, array: Array, python: str) -> list[str]:
    nodes = ["--nodes", array.nodes] if array.nodes else []
    return [python, "-u", "-m", "jobs.slurm.supervisor", "--stop-signal-seconds", str(cluster.stop_signal_seconds), *nodes]


def _leaving(cluster: ClusterProfile, array: Array, python: str) -> list[str]:
    """Return the shell lines that move the job to another node if its setup ends it."""
    if not array.nodes:
        return []
    successor = ["--successor", array.successor, array.argument] if array.successor else []
    words, code = shlex.join([*_supervisor(cluster, array, python), *successor]), shlex.quote(str(array.code))
    return [
        f"setup_failed() {{ local status=$?; cd {code} && PYTHONPATH={code} {words} --setup-failed $status; }}",
        "trap setup_failed EXIT",
    ]


def _command(cluster: ClusterProfile, array: Array, python: str) -> str:
    words = shlex.split(cluster.python) or [python]
    # Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
    srun = ["srun", "--unbuffered", "--kill-on-bad-exit=1", f"--cpus-per-task={cluster.threads_per_rank}"]
    rank = [*words, "-u", "-m", array.module, array.argument]
    successor = ["--successor", array.successor, array.argument] if array.successor else []
    supervisor = [*_supervisor(cluster, array, python), *successor, "--"]
    run = [["bash", str(array.code / array.script), array.argument], words] if array.script else [srun, rank]
    return " \\\n    ".join(map(shlex.join, [supervisor, *run]))


def _site_options(cluster: ClusterProfile) -> dict[str, Any]:
    """Return the options that a site or a profile may change, and the profile's further ones.

    None stands for an option that is left out.
    """
    gres = cluster.gres or (f"gpu:{cluster.gpus_per_node}" if cluster.gpus_per_node else "")
    options: dict[str, Any] = {
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "gres": gres,
        "mem": f"{int(cluster.memory_gb_per_trial * _MB_A_GB / cluster.nodes_per_trial)}M",  # of one node
        "requeue": True,
        "export": ",".join(dict.fromkeys([*clients.EXPORTED, *cluster.export])),
    }
    own = {option.replace("-", "_"): value for option, value in cluster.sbatch.items()}
    replaced = {name: None for name, others in _REPLACED_BY.items() if any(own.get(other) for other in others)}
    return {k: None if v is False or v == "" else v for k, v in {**options, **replaced, **own}.items()}


def unexported(cluster: ClusterProfile) -> str:
    """Return which variables of libraries are set here and do not reach jobs, and what to do, or ""."""
    names = clients.left_out(str(_site_options(cluster)["export"] or "ALL"))
    if not names:
        return ""
    several = len(names) > 1
    what = f"{', '.join(names)} {'are' if several else 'is'} set in this shell and {'do' if several else 'does'} not reach jobs"
    own = f"export=[{','.join([*cluster.export, *names])}] on the command line, or export in the cluster profile"
    return f"{what}; to pass {'them' if several else 'it'} on: {'sbatch.export' if 'export' in cluster.sbatch else own}"


def _executor(cluster: ClusterProfile, array: Array, python: str) -> _Executor:
    executor = _Executor(folder=array.log_folder)
    code = shlex.quote(str(array.code))
    options = {
        "output": str(array.log_folder).replace("%", "%%") + ("/%A_%a.log" if array.throttle else "/%j.log"),
        **({"dependency": "afterany:" + ":".join(array.after)} if array.after else {}),
        **({"comment": array.comment} if array.comment else {}),
        **_site_options(cluster),
    }
    executor.update_parameters(
        job_name=array.name,
        time=cluster.time_limit_minutes,
        nodes=cluster.nodes_per_trial,
        ntasks_per_node=cluster.ranks_per_trial // cluster.nodes_per_trial,
        cpus_per_task=cluster.threads_per_rank,
        signal_delay_s=cluster.stop_signal_seconds,
        setup=[
            *_leaving(cluster, array, python),
            _ALL_TO_STEPS,
            *cluster.setup,
            f"export OMP_NUM_THREADS={cluster.threads_per_rank}",
            f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"cd {code} || exit 1",
            *(["trap - EXIT"] if array.nodes else []),
        ],
        array_parallelism=array.throttle or 1,
        stderr_to_stdout=True,
        use_srun=False,  # the supervisor starts it
        wckey=None,
        additional_parameters={key: value for key, value in options.items() if value is not None},
    )
    if array.throttle:
        executor.parameters["map_count"] = array.size
    return executor


def render(cluster: ClusterProfile, array: Array, python: str = sys.executable) -> str:
    """Return the exact batch script that `submit` passes to sbatch. Needs no Slurm."""
    text = _executor(cluster, array, python)._make_submission_file_text(_command(cluster, array, python), "")
    out = "|".join(key.replace("_", "-") for key, value in _site_options(cluster).items() if value is None)
    return re.sub(rf"^#SBATCH --({out})(=.*)?\n", "", text, flags=re.M) if out else text  # those that submitit adds by itself


def launcher_overrides(cluster: ClusterProfile, launcher: str, name: str, folder: Path) -> list[str]:
    """Return the profile as Hydra overrides for `launcher` (submitit_slurm or submitit_local)."""
    values: dict[str, Any] = {"name": name, "timeout_min": cluster.time_limit_minutes, "cpus_per_task": cluster.threads_per_rank}
    if launcher == "submitit_slurm":
        values |= {
            "nodes": cluster.nodes_per_trial,
            "tasks_per_node": cluster.ranks_per_trial // cluster.nodes_per_trial,
            "signal_delay_s": cluster.stop_signal_seconds,
            "array_parallelism": cluster.max_parallel or 256,
            "max_num_timeout": 1000,  # a run that exceeds the limit goes on in the next job
            "stderr_to_stdout": True,
            # The launcher cannot set srun's options.
            "setup": [
                refuse_unless_private(folder),
                _ALL_TO_STEPS,
                *cluster.setup,
                "export SLURM_KILL_BAD_EXIT=1",
                f"export SRUN_CPUS_PER_TASK={cluster.threads_per_rank}",
            ],
        }
    shown = [f"hydra.launcher.{key}={_hydra_value(value)}" for key, value in values.items()]
    further = _site_options(cluster) if launcher == "submitit_slurm" else {}
    shown += [f"++hydra.launcher.additional_parameters.{key}={_hydra_value(value)}" for key, value in further.items() if value is not None]
    return [f"hydra.sweep.dir={_hydra_value(str(folder))}", *shown]


def adapt_submitit() -> None:
    """Let submitit, in this process, run Slurm's commands as we do: without the shell's variables, and with a site's banners ignored."""
    clients.adopt_environment()
    SlurmExecutor._get_job_id_from_submission_command = staticmethod(_number)  # type: ignore[assignment]
    SlurmInfoWatcher.read_info = _read_info  # type: ignore[method-assign, assignment]


def _number(said: str | bytes) -> str:
    text = said if isinstance(said, str) else said.decode(errors="replace")
    if not (job := clients.submitted(text)):
        raise SlurmError(f"sbatch: must print the number of the job; got {' '.join(text.split())[-200:]!r}")
    return job


_submitits_read_info, _HEADER = SlurmInfoWatcher.read_info, "JobID|State|NodeList"


def _read_info(watcher: SlurmInfoWatcher, said: str | bytes) -> dict[str, dict[str, str]]:
    text = said if isinstance(said, str) else said.decode(errors="replace")
    rows = [line for line in text.partition(_HEADER)[2].splitlines() if line.count("|") == 2 and line[:1].isdecimal()]
    return _submitits_read_info(watcher, "\n".join([_HEADER, *rows]))


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
    script = array.log_folder / f"submission_{uuid.uuid4().hex}.sh"
    write_atomic(script, render(cluster, array))
    job = send(script)
    script.rename(array.log_folder / f"{job}_submission.sh")
    return job


def send(script: Path) -> str:
    """Pass a batch script to sbatch once and return the job's ID; raise SlurmError with sbatch's message."""
    return _number(ask(["sbatch", str(script)], patience_seconds=0))
