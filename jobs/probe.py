"""`python -m jobs.probe RUN_OR_SWEEP [probes.*=...]`: the scores that completed runs lack, from their final checkpoints, without training.

Here, under torchrun, or as Slurm jobs. A job gets the same command with a file that says what to score.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnnjepa.run.files import read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import EvaluationStopped, RunFolder, RunStatus, never
from cnnjepa.run.identity import differences, from_dict, identity, lookup, put, to_dict
from cnnjepa.run.ranks import Device, broadcast_object, first_of, is_main_rank, joined, rank_count
from cnnjepa.run.scores import Probed, Scores, is_lacking, locked, record
from cnnjepa.run.typed import build, checked
from jobs import preflight, provenance, snapshot
from jobs.cli import STOPPED, Parser, begun, exit_status, printable, require_writable, stop_on_signals
from jobs.cluster import ClusterProfile, Scheduler, require_sbatch_path
from jobs.scores_text import score_lines
from jobs.slurm.limits import arrays_for, require_room
from jobs.slurm.nodes import Nodes, off_bad_nodes
from jobs.slurm.queue import Queue, SlurmError, has_slurm, own_restart
from jobs.slurm.ranks import adopt_srun_ranks
from jobs.slurm.sbatch import Array, render, submit
from jobs.task import Task, task_of
from jobs.trials import run_folder

ALL_THERE, NOT_SCORED = "nothing to do, all scores are there", "not scored"
_STARTS_ALLOWED = 10  # of one job: what is not scored by then needs a longer limit


@dataclass(frozen=True)
class Request:
    """What to score, and how: all that a job needs."""

    runs: list[Path]
    values: dict[str, Any]  # key -> value, in place of the runs' own
    threads: int
    device: str  # "" where the task has none
    data_root: str  # for runs that name none
    jobs: int = 1  # each takes a share of the runs

    def write(self, path: Path) -> None:
        """Write the file that a job reads."""
        root = path.parent.parent  # a run is named from there, since the folder may be moved
        runs = [str(run.relative_to(root) if run.is_relative_to(root) else run) for run in self.runs]
        write_atomic(path, sealed_json({**vars(self), "runs": runs}))

    @staticmethod
    def load(path: Path) -> "Request":
        """Read it; raise ValueError where `write` has not written it."""
        with reading(path):
            found, root = build(Request, read_json(path)), path.resolve().parent.parent
            runs = [root / run for run in found.runs]
            for run in runs:
                if not run.resolve().is_relative_to(root):
                    raise TypeError(f"runs must be within {root}; got {run}")
            return replace(found, runs=runs)

    def configs(self, folder: RunFolder) -> tuple[Any, Any]:
        """Return a run's own configuration, and the one to score it by."""
        own = folder.config()
        values, task = to_dict(own), task_of(own)
        for key, value in self.values.items():
            lookup(values, key)  # refused where the run has no such key
            put(values, key, value)
        config = from_dict(values)
        changed = [line for line in differences(identity(own), identity(config)) if not line.startswith(f"{_probes(task)}.")]
        if changed:
            raise ValueError(f"{changed[0].partition(':')[0]} must be as it was when the run was trained; got {changed[0]}")
        task.put(config, "threads", self.threads)
        task.put(config, "data_root", task.get(config, "data_root", "") or self.data_root)
        if self.device:
            task.put(config, "device", Device[self.device])
        return own, config


@dataclass(frozen=True)
class Work:
    """What one run lacks."""

    folder: RunFolder
    config: Any
    parts: Sequence[Probed]

    @property
    def wanted(self) -> dict[str, list[str]]:
        """Return the names of the probes by data set."""
        return {data: [p.name for p in self.parts if p.data == data] for data in dict.fromkeys(p.data for p in self.parts)}


def _probes(task: Task) -> str:
    """Return the key of the settings that scores depend on."""
    return task.KEYS.get("probes", "probes")


def runs_of(path: Path) -> list[Path]:
    """Return the run folders of a run, or of a sweep in its order; raise ValueError where `path` is neither."""
    if (path / "config.yaml").exists():
        return [path]
    if not (path / "sweep.json").exists():
        raise ValueError(f"RUN_OR_SWEEP must be a run folder, with config.yaml, or a sweep folder, with sweep.json; got {path}")
    with reading(path / "sweep.json"):
        values = read_json(path / "sweep.json")
        listed = [checked(str, trial["signature"], "signature") for trial in values["trials"]]
        there = sorted(p.parent for p in (path / "trials").glob("*/config.yaml"))
        # A search lists its first trial alone.
        chosen = there if values["search"] else [p for p in there if p.name in listed]
    for run in chosen:
        RunFolder(run).check(None)  # no link may lead out of the sweep
    return sorted(chosen, key=lambda p: listed.index(p.name) if p.name in listed else len(listed))


def request_of(runs: Sequence[Path], cluster: str, overrides: Sequence[str]) -> tuple[Request, ClusterProfile]:
    """Return what the command line asks for; raise ValueError, one line, at an override that does more than score."""
    from jobs.config import compose_job, qualified  # Hydra is slow to import, and a job needs none of it

    readable = _first_readable(runs)
    own = readable.config()
    task = task_of(own)
    task.probed(own, own)  # refused where the task does not score later
    keys = [o.partition("=")[0] for o in qualified(overrides, task.name) if not o.startswith(("cluster.", "cluster="))]
    free = [task.KEYS[what] for what in ("data_root", "workers", "device") if what in task.KEYS]
    for key in keys:
        if not key.startswith(f"{_probes(task)}.") and key not in free:
            rule = f"begin with {_probes(task)}., or be {', '.join(free)} or a key of the cluster profile: nothing is trained"
            raise ValueError(f"an override must {rule}; got {next(o for o in overrides if o.startswith(key))}")
    job = compose_job([f"cluster={cluster}", *overrides], task.name, trains=False)
    values, device = to_dict(job.train), task.get(job.train, "device", None)
    chosen = {key: lookup(values, key) for key in keys if key != task.KEYS.get("device")}
    request = Request(list(runs), chosen, job.cluster.threads_per_rank, device.name if device else "", job.cluster.data_root)
    request.configs(readable)  # refused where an override would change what was trained
    return request, job.cluster


def _first_readable(runs: Sequence[Path]) -> RunFolder:
    """Return the first run whose configuration can be read, else the first."""
    for path in runs:
        with suppress(ValueError):
            RunFolder(path).config()
            return RunFolder(path)
    return RunFolder(runs[0])


def may_have_completed(path: Path) -> bool:
    """Return whether the run has completed, or its result cannot be read, which is said later."""
    try:
        result = RunFolder(path).result()
    except ValueError:
        return True
    return result is not None and result.status is RunStatus.completed


def work_of(request: Request, path: Path) -> Work | str:
    """Return what the run lacks, or why there is nothing to do."""
    folder = RunFolder(path)
    result = folder.result()
    if result is None or result.status is not RunStatus.completed:  # a command has taken it up meanwhile
        return "left out, it has not completed"
    own, config = request.configs(folder)
    parts = [part for part in task_of(config).probed(config, own) if is_lacking(folder, result, part)]
    return Work(folder, config, parts) if parts else ALL_THERE


def say(path: Path, text: str) -> None:
    """Print one line about a run, on one rank."""
    if is_main_rank():
        print(printable(f"{path}: {text}", keep="\n"), flush=True)


def written(work: Work, found: Scores) -> list[str]:
    """Record the scores of one run; return the lines that say so."""
    about = {**found.about, **{k: v for k, v in provenance.provenance().items() if k in ("commit", "host", "time", "command")}}
    lines = [f"failed: {found.failure}" if found.failure else "scored"]
    for part in work.parts:
        file = record(work.folder, part, replace(found, about=about))
        where = "" if part.is_own else f" (configured otherwise than in the run: {file.relative_to(work.folder.path)})"
        lines += score_lines(task_of(work.config), part.mine(found.metrics), found.images, where)
        lines += [f"  {part.label} has no value: {found.missing[part.label]}"] if part.label in found.missing else []
    return lines


def examined(request: Request, path: Path) -> Work | str:
    """Return `work_of`, or the fault of a file as a line that begins with `NOT_SCORED`."""
    try:
        return work_of(request, path)
    except ValueError as error:
        return f"{NOT_SCORED}: {error}"


def score(request: Request, path: Path, wait: bool, stop: Callable[[], bool]) -> bool | None:
    """Score one run, on all ranks alike; return whether all that was asked for has a value.

    Return None where another command scores the run now, unless `wait` is set. Raise
    EvaluationStopped on all ranks if `stop` ended a long evaluation, which goes on at the next start.
    """
    with joined(Device[request.device or "cpu"]) as ranks, ExitStack() as stack:
        folder = RunFolder(path)
        folder.should_stop = stop
        work: Work | str | None = examined(request, path) if ranks.is_main else ""
        if isinstance(work, Work):
            work = examined(request, path) if stack.enter_context(locked(folder, wait)) else None
        said: tuple[str | None, dict[str, list[str]]] = ("", work.wanted) if isinstance(work, Work) else (work, {})
        why, wanted = broadcast_object(said, ranks)
        if not wanted:
            if why:
                say(path, why)
            return None if why is None else not why.startswith(NOT_SCORED)
        try:
            _, config = request.configs(folder)
            found = task_of(config).probe(config, folder, wanted)
        except EvaluationStopped:
            raise
        except Exception as error:
            if ranks.count > 1 and not isinstance(error, ValueError):
                raise  # on this rank alone: its end tells the launcher to end the others
            say(path, f"{NOT_SCORED}: {' '.join(str(error).split())}")
            return False
        try:
            if isinstance(work, Work):
                say(path, "\n".join(written(work, found)))
        except OSError as error:
            say(path, f"{NOT_SCORED}: {error}")
            return False
        return not found.missing and not found.failure


def score_all(request: Request, runs: Sequence[Path], stop: Callable[[], bool] = never) -> int:
    """Score runs one after the other, last those that another command scores now; return the exit status."""
    todo = list(runs)
    if rank_count() == 1:  # what needs no torch comes first
        for path, work in [(path, examined(request, path)) for path in runs]:
            if work == ALL_THERE:
                say(path, ALL_THERE)
                todo.remove(path)
    if not todo:
        return 0
    begun()
    status, busy = 0, list[Path]()
    with joined(Device[request.device or "cpu"]) as ranks:
        for wait, paths in ((False, broadcast_object(todo, ranks)), (True, busy)):
            for path in paths:
                if first_of("stop" if stop() else "", ranks):
                    return STOPPED
                if wait:
                    say(path, "waits for another command that scores it")
                try:
                    done = score(request, path, wait, stop)
                except EvaluationStopped as stopped:
                    say(path, f"stopped in {stopped}; the same command goes on there")
                    return STOPPED
                if done is None:
                    busy.append(path)
                elif not done:
                    status = 1
    return status


def submit_jobs(request: Request, root: Path, cluster: ClusterProfile, dry_run: bool) -> int:
    """Submit jobs for the runs that lack scores, and return at once; raise ValueError where Slurm would not take them."""
    todo = []
    for path in request.runs:
        work = examined(request, path)
        if isinstance(work, Work):
            todo.append(path)
        else:
            say(path, work)
    if not todo:
        return 0
    require_sbatch_path(root, "RUN_OR_SWEEP")
    called = hashlib.sha256(json.dumps([str(root), request.values], sort_keys=True).encode()).hexdigest()[:8]
    name, code, queue = f"probe-{root.name}-{called}", root / "code" / snapshot.digest(), Queue(0)
    if not (dry_run or has_slurm()):
        raise ValueError(f"--cluster {cluster.name} must be used where Slurm is installed; got no squeue here: use --dry-run to look at it")
    if not dry_run and (queued := [e.array for e in queue.named(name) if not e.ended]):
        print(f"job {queued[0]} is queued or runs and scores this: nothing was submitted")
        return 0
    sizes = arrays_for(len(todo), cluster, (cluster.max_queued or None) if dry_run else require_room(cluster, queue))
    parts = []
    for number, (size, throttle) in enumerate(sizes):
        suffix = f"-{number}" if len(sizes) > 1 else ""
        file = root / "scores" / f"request-{called}{suffix}.json"
        array = Array(f"{name}{suffix}", size, throttle, "jobs.probe", str(file), code, root / "log", f"scores of {root}")
        parts.append((array, file, replace(request, runs=todo[number :: len(sizes)], jobs=size)))
    count = sum(array.size for array, _, _ in parts)
    if dry_run:
        print(f"{len(todo)} runs to score in {count} jobs\n\n{render(cluster, parts[0][0])}", end="")
        return 0
    require_writable(root / "scores", "RUN_OR_SWEEP")
    of_sweep = next((folder for folder in (root, root.parent.parent) if (folder / "sweep.json").exists()), None)
    cluster = off_bad_nodes(cluster, Nodes(of_sweep / "nodes")) if of_sweep else cluster
    findings = preflight.check_request(cluster, parts[0][0])
    if problems := [f"{f.what}: {f.said}" for f in findings if f.level == "problem"]:
        raise ValueError("preflight found what would stop the jobs, nothing was submitted: " + "; ".join(problems))
    for _, file, asked in parts:
        asked.write(file)
    snapshot.take(root / "code", provenance.commit_and_diff())
    return _submit(cluster, [(array, len(asked.runs)) for array, _, asked in parts])


def _submit(cluster: ClusterProfile, parts: Sequence[tuple[Array, int]]) -> int:
    """Submit arrays, each with the number of runs that it scores; return the exit status: 1 if only some were submitted."""
    made = []
    for array, runs in parts:
        try:
            made.append(submit(cluster, array))
        except SlurmError as error:
            if not made:
                raise
            rest = f"{len(parts) - len(made)} of {len(parts)} jobs are not submitted, and their runs not scored: {error}"
            print(f"{rest}; run the command again when jobs {', '.join(made)} have ended")
            return 1
        many = f"{array.size} jobs" if array.throttle else "a single job"
        print(f"submitted job {made[-1]}: {runs} runs to score in {many}; their output: {array.log_folder}/{made[-1]}*.log")
    return 0


def run_job_share(file: Path) -> int:
    """Score this job's share of the runs, on this rank; return what its supervisor goes by."""
    with stop_on_signals() as stop:
        adopt_srun_ranks()
        request = Request.load(file)
        if own_restart() > _STARTS_ALLOWED:
            print(f"{_STARTS_ALLOWED} starts of this job have not scored its runs, is the time limit too short?", flush=True)
            return 0
        number = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        status = score_all(request, request.runs[number :: request.jobs], stop)
        # What has no value is recorded with its cause. The supervisor would start any other status again.
        return status if status == STOPPED else 0


def command_line() -> Parser:
    """Return the parser of the command."""
    text = """Compute the scores that completed runs lack, from their final checkpoints. Nothing is trained.

What is there stays. Scores of probes that are configured otherwise than in the run stand beside its result.

Exit status: 0 every completed run has its scores, or jobs are queued, 1 one has none, 2 wrong usage."""
    example = """examples:
  python -m jobs.probe runs/predictor_ablation-smoke
  python -m jobs.probe runs/predictor_ablation-smoke 'probes.data=[fashion_mnist]'"""

    def keys() -> list[str]:
        from jobs.config import override_keys

        return override_keys()

    parser = Parser(prog="python -m jobs.probe", description=text, epilog=example, keys=keys, intermixed=True)
    what = parser.add_argument_group("what to score")
    what.add_argument("folder", type=Path, metavar="RUN_OR_SWEEP", help="run folder, SWEEP_FOLDER/TRIAL or sweep folder")
    what.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="set a key of the probes (probes.knn_k=20) or of the profile"
    )
    where = parser.add_argument_group("where")
    where.add_argument("--cluster", default="local", metavar="PROFILE", help="name, or path of a .yaml file (default: %(default)s)")
    where.add_argument("--dry-run", action="store_true", help="show what would be scored, and the batch script; run nothing")
    return parser


def run(asked: argparse.Namespace) -> int:
    """Do what the command line asks; return the exit status. Raise ValueError before anything starts."""
    folder = run_folder(asked.folder, "RUN_OR_SWEEP")
    if folder.is_file():
        return run_job_share(folder)
    runs = runs_of(folder)
    completed = [path for path in runs if may_have_completed(path)]
    if not completed:
        raise ValueError(f"RUN_OR_SWEEP must hold a run that has completed; got {folder}, where none has")
    request, cluster = request_of(completed, asked.cluster, asked.overrides)
    if (left := len(runs) - len(completed)) and is_main_rank():
        print(f"{left} of {len(runs)} runs have not completed: left out")
    if cluster.scheduler is Scheduler.slurm:
        return submit_jobs(request, folder, cluster, asked.dry_run)
    if asked.dry_run:
        for path in completed:
            work = examined(request, path)
            say(path, work if isinstance(work, str) else "to score: " + ", ".join(part.label for part in work.parts))
        return 0
    adopt_srun_ranks()
    return score_all(request, completed)


def main() -> int:
    """Run the command line and return the exit status, which --help explains."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return exit_status(lambda: run(command_line().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
