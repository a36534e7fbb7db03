"""Shells and sites as users have them: variables that Slurm's commands obey, and banners around what they print."""

import shutil
from pathlib import Path

CLIENTS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "srun", "sbalance")
# What a person's shell, an `salloc --mem-per-cpu` or a job may hold.
SHELL = {
    "SBATCH_ACCOUNT": "other",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_EXPORT": "NONE",
    "SALLOC_PARTITION": "other",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_STATES": "R",
    "SACCT_FORMAT": "jobid",
    "SACCT_FEDERATION": "1",
    "SINFO_PARTITION": "other",
    "SCANCEL_STATE": "PENDING",
    "SCONTROL_ALL": "1",
    "SLURM_CLUSTERS": "other",
    "SLURM_TIME_FORMAT": "relative",
    "SLURM_MEM_PER_CPU": "1000",
    "SLURM_JOB_ID": "7",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURMD_NODENAME": "gpu01",
    "SRUN_CPUS_PER_TASK": "4",
    "_SLURM_SPANK_OPTION_pyxis_container_image": "other",
    "LC_ALL": "de_DE.UTF-8",
}
KEPT = {"SLURM_CONF": "/etc/own.conf", "SLURM_JWT": "token", "HTTPS_PROXY": "http://proxy", "MUNGE_ROOT": "/m"}
BANNERS = {
    "none": ("", ""),
    "before": ("Welcome to cluster 9\n\n--> Checking job 12 of proj|gpu|3 ... OK\n", ""),
    "after": ("", "\n=== 2 jobs of yours | RUNNING | see JobState=FAILED and PartitionName ===\n"),
    "on the same line": ("site policy v2: ", "bye\n"),
    "no text": ("\x1b[31m\udcff\udcfe\n", "\x00\n"),
}


def put_banners(folder: Path, banner: str = "before") -> Path:
    """Wrap each of Slurm's commands in a script that prints a banner; return the folder for PATH."""
    folder.mkdir()
    for name, text in zip(("before", "after"), BANNERS[banner], strict=True):
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    for name in CLIENTS:
        if (program := shutil.which(name)) is not None:
            lines = ["#!/bin/bash", f"cat {folder}/before", 'echo "--> Connecting ... OK" >&2', f'{program} "$@"', "status=$?"]
            # srun's output is that of the ranks.
            lines += [] if name == "srun" else [f"cat {folder}/after"]
            (folder / name).write_text("\n".join([*lines, "exit $status", ""]))
            (folder / name).chmod(0o755)
    return folder
