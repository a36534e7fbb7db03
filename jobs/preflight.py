"""`python -m jobs.preflight`: find what would stop a submission before it is made."""

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from cnnjepa.run.files import write_atomic
from cnnjepa.run.identity import from_dict, to_dict
from jobs.cli import Parser, begun, exit_status, for_now, printable, require_writable, resolved
from jobs.cluster import ClusterProfile, Scheduler, require_sbatch_path
from jobs.config import compose_job, override_keys
from jobs.file_system import check_files, check_other, leave_for_other
from jobs.slurm import queue as slurm
from jobs.slurm.limits import array_limit, shares
from jobs.slurm.queue import SlurmError
from jobs.slurm.refusals import is_full
from jobs.slurm.sbatch import Array, render, send, unexported
from jobs.staging import PackedSet, StagingError, obstacle
from jobs.task import task_of

# File systems that other nodes do not see.
_NODE_LOCAL = {"tmpfs", "ext4", "ext3", "xfs", "btrfs", "overlay", "zfs"}
_FILES_A_TRIAL = 40
_ON_NODE_MINUTES = 10
_GPU_SECONDS, _GPU_SECONDS_ON_NODE = 450.0, 60.0


@dataclass(frozen=True)
class Finding:
    """Result of one check. A problem stops a submission; a warning is only printed."""

    level: str  # ok, warning (something may go wrong, or could not be checked), problem
    what: str
    said: str


ok, warning, problem = (functools.partial(Finding, level) for level in ("ok", "warning", "problem"))


def minutes_of(limit: str) -> float:
    """Convert Slurm's [days-]hours:minutes:seconds to minutes; UNLIMITED is infinity."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+)*", limit):
        return float("inf")
    days, _, rest = limit.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    hours, minutes, seconds = ([*parts, 0, 0])[:3] if days or len(parts) == 3 else [0, *parts, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def check_request(cluster: ClusterProfile, array: Array) -> list[Finding]:
    """Check with `sbatch --test-only` that Slurm would accept the script; queue nothing."""
    if shutil.which("sbatch") is None:
        return [problem("Slurm", "sbatch must be on this machine's PATH; got none: submit from a login node, or use --dry-run")]
    what = f"array of {array.size}" if array.throttle else "a single job"
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(render(cluster, array))
        script.flush()
        try:
            slurm.ask(["sbatch", "--test-only", script.name], patience_seconds=60)
        except SlurmError as error:
            if "node configuration" in str(error) and (away := nodes_away(cluster)):
                return [warning("request", f"{away}: Slurm cannot say now whether the nodes suffice; jobs wait for them")]
            if is_full(str(error)):
                return [warning("request", f"not all jobs may be queued now, what fits is submitted: {error}")]
            asked = f"account {cluster.account or '-'}, partition {cluster.partition or '-'}, qos {cluster.qos or '-'}, {what}"
            return [problem("request", f"Slurm must accept the job ({asked}); got {error}")]
    return [ok("request", f"sbatch --test-only accepts the script, {what}")]


def nodes_away(cluster: ClusterProfile) -> str:
    """Describe drained, down or silent nodes, or return "". Slurm refuses jobs that need them."""
    states = list(slurm.node_states(cluster.partition).values())
    away = [state for state in states if slurm.is_out_of_use(state)]
    return f"{len(away)} of {len(states)} nodes are {', '.join(sorted(set(away)))}" if away else ""


def check_limits(cluster: ClusterProfile) -> list[Finding]:
    """Check time limit and partition: Slurm accepts a job that is too long but never starts it."""
    try:
        shown = slurm.ask(["scontrol", "show", "partition", "-o", *([cluster.partition] if cluster.partition else [])], 60)
    except SlurmError as error:
        return [problem("partition", f"cluster.partition must be one that Slurm has; got {cluster.partition}: {error}")]
    listed = re.findall(r"PartitionName=.*", shown)  # other lines, and text before it, are a site's
    partition = next((line for line in listed if cluster.partition or "Default=YES" in line), "")
    longest = re.search(r"\bMaxTime=(\S+)", partition)
    if longest and minutes_of(longest[1]) < cluster.time_limit_minutes:
        said = f"cluster.time_limit_minutes must be at most the partition's {minutes_of(longest[1]):.0f}; got {cluster.time_limit_minutes}"
        return [problem("time limit", said)]
    state = re.search(r"\bState=(\S+)", partition)
    found = [ok("time limit", f"{cluster.time_limit_minutes} min; the partition allows {longest[1] if longest else 'unknown'}")]
    if state and state[1] != "UP":
        found.append(warning("partition", f"{cluster.partition} is {state[1]}: jobs wait until it is UP"))
    return found


def check_folders(runs_dir: Path, trials: int, bytes_a_trial: int) -> list[Finding]:
    """Check that the runs folder is writable and has room and inodes for `trials` runs."""
    try:
        require_writable(runs_dir, "runs_dir")
    except ValueError as error:
        return [problem("runs folder", f"{error}; give another with --runs-dir")]
    room = os.statvfs(runs_dir)
    free, inodes = room.f_bavail * room.f_frsize, room.f_favail
    need, files = trials * bytes_a_trial, trials * _FILES_A_TRIAL
    enough = free >= need and (inodes >= files or not room.f_files)
    said = f"{need / 1e9:.1f} GB and {files} files needed at most, {free / 1e9:.1f} GB and {inodes} inodes free"
    found = [ok("runs folder", f"{runs_dir} can be written")]
    found.append(ok("room", said) if enough else problem("room", f"{runs_dir} must have room for {trials} runs; got: {said}"))
    if quota := slurm.site_tool("squota"):
        found.append(ok("squota", " | ".join(quota.split("\n")[:6])))
    return found


def check_runs_dir(runs_dir: Path, trials: int, bytes_a_trial: int) -> list[Finding]:
    """Return what `check_folders` and, if the folder can be written, `check_files` find."""
    with for_now(runs_dir):
        found = check_folders(runs_dir, trials, bytes_a_trial)
        return found + [Finding(*checked) for checked in (check_files(runs_dir) if found[0].level == "ok" else [])]


def check_shared(runs_dir: Path) -> Finding:
    """Check by the type of its file system that all nodes see the runs folder."""
    mounts = [m for m in psutil.disk_partitions(all=True) if runs_dir.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"
    if kind in _NODE_LOCAL:
        return warning("shared", f"{runs_dir} is on {kind}, which other nodes usually cannot see; --on-node checks it")
    return ok("shared", f"{runs_dir} is on {kind}")


def check_data(config: Any) -> list[Finding]:
    """Check with the task that the data of a configuration are complete."""
    try:
        said = task_of(config).check_data(config)
    except ValueError as error:
        return [problem("data", str(error))]
    return [ok("data", said)] if said else []


def checked_data(values: dict[str, object]) -> list[Finding]:
    """Run `check_data` in a forked process, which frees its image lists."""
    try:
        with ProcessPoolExecutor(1, get_context("fork")) as pool:
            return pool.submit(check_data, from_dict(values)).result()
    except Exception as error:  # whatever a task raises, or the death of the process for lack of memory
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return [problem("data", f"the images must be readable; got {said[-300:]}")]


def to_stage(cluster: ClusterProfile, configs: Sequence[dict[str, object]]) -> list[PackedSet]:
    """Return the packed sets that jobs of `configs` copy to their nodes, largest first."""
    sets = {}
    for values in configs if cluster.local_scratch else ():
        root = str(task_of(values).value(values, "data_root", "") or cluster.data_root)
        with contextlib.suppress(StagingError):  # the job warns and reads the set in place
            if root and (packed := PackedSet.of(Path(root))) is not None:
                sets[packed.key] = packed
    return sorted(sets.values(), key=lambda s: -s.bytes)


def check_staging(cluster: ClusterProfile, configs: Sequence[dict[str, object]], on_node: str | None = None) -> list[Finding]:
    """Report what jobs stage; `on_node` is the obstacle, "" if there is none, None if unknown."""
    sets = to_stage(cluster, configs)
    if not sets:
        return [ok("staging", "nothing is copied to the nodes: data.root holds no packed set")] if cluster.local_scratch else []
    what = f"{sets[0].bytes / 1e9:.2f} GB of {sets[0].folder} to {cluster.local_scratch}"
    if on_node is None:
        return [ok("staging", f"each node copies {what} once; --on-node checks that it fits")]
    if on_node:
        return [warning("staging", f"a node cannot copy {what}; jobs will read the original: {on_node}")]
    return [ok("staging", f"each node copies {what} once; it fits")]


_ON_NODE = """
import json, os, platform, sys
from pathlib import Path
import torch, torchvision, submitit, optuna
folder, device = Path(sys.argv[1]), sys.argv[2]
if os.environ.get("SLURM_PROCID", "0") == "0":
    found = torch.cuda.device_count()
    assert device != "cuda" or found, "torch sees no CUDA device here"
    if sys.argv[3]:
        from jobs.staging import PackedSet, obstacle
        (folder / "staging").write_text(obstacle(PackedSet.of(Path(sys.argv[4])), sys.argv[3]))
    from jobs.file_system import check_files, check_other, leave_for_other
    if sys.argv[5] and found:
        from jobs.preflight import gpu_findings
        (folder / "gpu").write_text(json.dumps(gpu_findings(json.loads((folder / "config.json").read_text()), float(sys.argv[5]))))
    leave_for_other(folder, "the node")
    files = check_other(folder, "this machine") + check_files(folder)
    (folder / "files").write_text(json.dumps([found for found in files if found[0] != "ok"]))
    (folder / "from-node").write_text(f"{platform.node()}: torch {torch.__version__}, {found} CUDA devices")
"""


def gpu_findings(values: dict[str, object], seconds: float) -> list[tuple[str, str, str]]:
    """Check this machine's GPU with the task of `values`: level, what, and what was seen."""
    return task_of(values).check_gpu(from_dict(values), seconds)


def check_gpu(config: Any) -> int:
    """Print what a check of this machine's GPU finds; return the exit status. Without a GPU it is not run, which is no problem."""
    found = gpu_findings(to_dict(config), _GPU_SECONDS)
    for level, what, said in found:
        print(printable(f"not run: {said}" if level == "not run" else f"{level:8} {what}: {said}"))
    return 1 if any(level == "problem" for level, _, _ in found) else 0


def check_on_node(cluster: ClusterProfile, runs_dir: Path, configs: Sequence[dict[str, object]]) -> list[Finding]:
    """Run a job that imports the environment on a node and writes to `runs_dir`; wait for it."""
    sets = to_stage(cluster, configs)
    require_writable(runs_dir, "runs_dir")
    folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=runs_dir))
    code = Path(__file__).resolve().parent.parent
    try:
        write_atomic(folder / "on_node.py", _ON_NODE)
        leave_for_other(folder, "this machine")
        array = Array("cnnjepa-preflight", *shares(1, array_limit(), 1)[0], "jobs.preflight", "", code, folder)
        head = [line for line in render(cluster, array).splitlines() if not line.startswith("#SBATCH --time")]
        head = head[: head.index("# command")]
        python = shlex.join(shlex.split(cluster.python) or [sys.executable])
        room = [cluster.local_scratch, str(sets[0].folder)] if sets else ["", ""]
        head.insert(1, f"#SBATCH --time={_ON_NODE_MINUTES}")
        gpu = [cluster.device.name, f"{_GPU_SECONDS_ON_NODE:g}"] if cluster.gpus_per_trial else ["cpu", ""]
        if configs:
            write_atomic(folder / "config.json", json.dumps(configs[0]))
        words = shlex.join([str(folder / "on_node.py"), str(folder), gpu[0], *room, gpu[1] if configs else ""])
        srun = f"srun --kill-on-bad-exit=1 --cpus-per-task={cluster.threads_per_rank} {python} {words}"
        write_atomic(folder / "job.sh", "\n".join([*head, srun, ""]))
        job = send(folder / "job.sh")
        print(f"job {job} checks a node; waiting for the queue (Ctrl-C cancels the job)", flush=True)
        try:
            queue = slurm.Queue(2)
            while (state := queue.state(f"{job}_0" if array.throttle else job)) not in slurm.ENDED and state != slurm.GONE:
                time.sleep(2)
        except KeyboardInterrupt:
            slurm.cancel([job])
            raise
        answer = folder / "from-node"
        if state == "COMPLETED" and answer.exists():
            found = [ok("node", f"{answer.read_text()}; {runs_dir} is shared")]
            found += [Finding(level, f"{what} on the node", said) for level, what, said in json.loads((folder / "files").read_text())]
            found += [Finding(*seen) for seen in check_other(folder, "the node")]
            if (seen_there := folder / "gpu").exists():
                found += [Finding(level, f"GPU {what}", said) for level, what, said in json.loads(seen_there.read_text())]
            return found + (check_staging(cluster, configs, (folder / "staging").read_text()) if sets else [])
        log = next(iter(folder.glob("*.log")), None)
        tail = " | ".join(log.read_text().split("\n")[-4:]) if log else "it left no log: is the folder shared?"
        return [problem("node", f"the environment must be importable on a node, and {runs_dir} must be shared; got {state}: {tail}")]
    except SlurmError as error:
        return [problem("node", f"a job must be able to check a node; got {error}")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def preflight(
    cluster: ClusterProfile, array: Array, runs_dir: Path, trials: int, bytes_a_trial: int, configs: Sequence[dict[str, object]]
) -> list[Finding]:
    """Return all findings about a submission of `array`; queue nothing."""
    found = check_request(cluster, array)
    if found[0].what != "Slurm":
        found += check_limits(cluster)
    if left_out := unexported(cluster):
        found.append(warning("environment", left_out))
    found += [*check_runs_dir(runs_dir, trials, bytes_a_trial), check_shared(runs_dir)]
    for values in configs:
        found += checked_data(values)
    return found + check_staging(cluster, configs)


def main() -> int:
    """Run the command line and return the exit status that --help explains."""
    text = """Check what would stop a submission: account, limits, folders, data and packages.

Exit status: 0 nothing, 1 a problem, 2 wrong usage."""
    example = "example:\n  python -m jobs.preflight --cluster komondor --on-node account=abc data=imagenet100"
    parser = Parser(
        prog="python -m jobs.preflight",
        description=text,
        epilog=example,
        keys=override_keys,
        renamed={"--slots": "--workers"},
        intermixed=True,
    )
    what = parser.add_argument_group("what to check")
    what.add_argument("overrides", nargs="*", metavar="key=value", help="such as account=abc or data=imagenet100")
    what.add_argument(
        "--workers", type=int, default=1, metavar="N", help="workers to submit, the size of the job array (default: %(default)s)"
    )
    what.add_argument(
        "--on-node",
        action="store_true",
        help="also run a short job that imports the environment on a node, and checks its GPU for a minute",
    )
    what.add_argument("--gpu", action="store_true", help="check only the GPU of this machine, for at most 8 minutes")
    where = parser.add_argument_group("where")
    where.add_argument("--cluster", default="local", metavar="PROFILE", help="name, or path of a .yaml file (default: %(default)s)")
    where.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of all sweeps (default: the profile's runs_dir)")
    return exit_status(lambda: run(parser.parse_args()))


def run(asked: argparse.Namespace) -> int:
    """Check what the command line asks for; return the exit status. Raise ValueError at wrong usage."""
    if asked.workers < 1:
        raise ValueError(f"--workers must be at least 1; got {asked.workers}")
    if asked.gpu and asked.on_node:
        raise ValueError("--gpu must be given without --on-node, which checks the node's GPU; got both: leave out one")
    job = compose_job([f"cluster={asked.cluster}", *asked.overrides])
    if asked.gpu:
        begun()
        return check_gpu(job.train)
    runs_dir = resolved(asked.runs_dir or Path(job.cluster.runs_dir), "--runs-dir" if asked.runs_dir else "runs_dir")
    if job.cluster.scheduler is Scheduler.slurm:
        require_sbatch_path(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    begun()
    cluster = job.cluster
    code = Path(__file__).resolve().parent.parent
    values, room = to_dict(job.train), task_of(job.train).bytes_of_a_run(job.train)
    if cluster.scheduler is Scheduler.slurm:
        size, throttle = shares(asked.workers, array_limit(), asked.workers)[0]
        array = Array("cnnjepa-preflight", size, throttle, "sweeps.execution.worker_main", "", code, runs_dir)
        found = preflight(cluster, array, runs_dir, asked.workers, room, [values])
        if asked.on_node and not any(f.level == "problem" for f in found):
            found += check_on_node(cluster, runs_dir, [values])
    else:
        found = check_runs_dir(runs_dir, asked.workers, room) + checked_data(values)
        sets = to_stage(cluster, [values])
        found += check_staging(cluster, [values], obstacle(sets[0], cluster.local_scratch) if sets else None)
    for finding in found:
        print(printable(f"{finding.level:8} {finding.what}: {finding.said}"))
    return 1 if any(f.level == "problem" for f in found) else 0


if __name__ == "__main__":
    sys.exit(main())
