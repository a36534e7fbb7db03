"""Run Slurm's commands: each one in an environment of its own, within a bounded time.

A variable of the user's shell would beat the batch script (SBATCH_TIMELIMIT), change what is
printed (SQUEUE_FORMAT, SLURM_TIME_FORMAT) or name another cluster (SLURM_CLUSTERS).
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence

# What a job gets of the submitting environment, if it is set there. The profile may name more.
EXPORTED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG"),
    *("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "CUDA_HOME"),
    # `module` of Lmod and of Environment Modules, and what they have loaded
    *("BASH_ENV", "BASH_FUNC_module%%", "BASH_FUNC_ml%%", "MODULEPATH", "MODULESHOME", "MODULES_CMD", "LOADEDMODULES", "_LMFILES_"),
    *("LMOD_CMD", "LMOD_DIR", "LMOD_PKG", "LMOD_ROOT", "LMOD_SETTARG_FULL_SUPPORT", "LMOD_SYSTEM_DEFAULT_MODULES"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "XDG_CACHE_HOME", "TORCH_HOME"),
)
# Libraries that training uses read these. A user who sets one expects it to apply, so each that is left out is named.
_OF_LIBRARIES = ("NCCL_", "RCCL_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "HIP_", "HSA_", "GLOO_", "UCX_", "FI_", "OMPI_")
_SET_BY_SLURM = frozenset({"CUDA_VISIBLE_DEVICES"})
_FROM_THE_SHELL = frozenset(os.environ)  # torch sets further ones while it runs
TIMEOUT_SECONDS = 60.0
# Which configuration the clients read, and as whom they ask.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET"})
_OPTIONS = ("SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SACCTMGR_", "SINFO_", "SCANCEL_", "SCONTROL_")
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SPANK_", "_SLURM_", "PMI_", "PMIX_")
# Options of srun that Slurm itself sets in no job; they come from a login shell that it has read on the node.
_NOT_OF_A_STEP = frozenset(
    {
        *("SRUN_EXPORT_ENV", "SLURM_EXPORT_ENV", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SLURM_DEBUG"),
        *("SLURM_ACCOUNT", "SLURM_PARTITION", "SLURM_QOS", "SLURM_RESERVATION", "SLURM_TIMELIMIT", "SLURM_DEPENDENCY", "SLURM_IMMEDIATE"),
        *("SLURM_EXIT_ERROR", "SLURM_EXIT_IMMEDIATE", "SLURM_LABELIO", "SLURM_STDINMODE", "SLURM_STDOUTMODE", "SLURM_STDERRMODE"),
        *("SLURM_NO_KILL", "SLURM_TEST_EXEC", "SLURM_WORKING_DIR", "SLURM_REMOTE_CWD", "SLURM_WAIT"),
    }
)


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a client: that of this process without Slurm's variables.

    Also those of an allocation or a job around this process are left out: a new job is no part of
    it, and sbatch would pass them on.
    """
    free = {k: v for k, v in given.items() if k in _KEPT or not k.startswith((*_OPTIONS, *_OF_A_JOB))}
    return {**free, "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}


def step_environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a command that starts steps of this job: srun reads Slurm's variables.

    JOB_HOSTS holds the names of the job's nodes.
    """
    ours = {k: v for k, v in given.items() if k not in _NOT_OF_A_STEP and not k.startswith(_OPTIONS)}
    return {**ours, "JOB_HOSTS": " ".join(hosts(given.get("SLURM_JOB_NODELIST", "")))}


def left_out(exported: str) -> list[str]:
    """Return the variables of libraries that are set here and that the value of --export does not pass to jobs."""
    names = exported.split(",")
    if "ALL" in names:
        return []
    passed = {name.partition("=")[0] for name in names} | _SET_BY_SLURM
    return sorted(name for name in _FROM_THE_SHELL if name.startswith(_OF_LIBRARIES) and name not in passed)


def run(command: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, or a site's command that calls them, and return what it said.

    Raise OSError if it cannot be started, and subprocess.TimeoutExpired after ending it, and what
    it has started, if it takes longer.
    """
    # A process group of its own: a site's wrapper may have children, and Ctrl-C must not cut an sbatch short.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        encoding="utf-8",
        errors="replace",
        process_group=0,
    ) as child:
        try:
            out, err = child.communicate(timeout=timeout_seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(list(command), child.returncode, out, err)


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command, such as srun, that starts steps of the job around this process."""
    return subprocess.Popen(command, env=step_environment())


def complaint(stderr: str) -> str:
    """Return what a client complains of, in one line: its errors, or all that it said if it marks none."""
    lines = [line.strip() for line in stderr.splitlines()]
    return " ".join(" ".join([line for line in lines if re.search(r"\b(error|fatal): ", line)] or lines).split())


def submitted(stdout: str) -> str:
    """Return the number of the job that sbatch has submitted, or "" if its output has none."""
    # Other lines, and text before it, are a site's.
    found: list[str] = re.findall(r"Submitted batch job (\d+)", stdout)
    return found[-1] if found else ""


def hosts(nodes: str) -> list[str]:
    """Return the names in a list of Slurm's, such as gpu[01-03,07],cpu1: gpu01, gpu02, gpu03, gpu07, cpu1."""
    found: list[str] = []
    for name in re.findall(r"(?:\[[^]]*\]|[^,\[])+", nodes):
        parts = re.split(r"\[([^]]*)\]", name)  # text, numbers, text, numbers, ..., text
        choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        found += ["".join(chosen) for chosen in itertools.product(*choices)]
    return found


def _numbers(ranges: str) -> list[str]:
    ends = [part.partition("-") for part in ranges.split(",")]
    return [f"{n:0{len(first)}}" for first, _, last in ends for n in range(int(first), int(last or first) + 1)]


def adopt_environment() -> None:
    """Give this process the environment of Slurm's clients, for a library that runs them itself."""
    ours = environment()
    os.environ.clear()
    os.environ |= ours
