"""Turn a command line into a planned and checked sweep: trials or a search, rungs, cluster."""

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnjepa.run.files import read_json, reading
from cnnjepa.run.identity import fidelity, length, lookup, task_module, to_dict
from cnnjepa.run.typed import checked
from jobs.cli import Parser, require_creatable, resolved
from jobs.cluster import ClusterProfile, Scheduler, require_sbatch_path
from jobs.config import PROFILES, override_keys, qualified
from jobs.plain import PlainTask
from jobs.task import task_named, task_of
from sweeps.cli import until_decided
from sweeps.cli.data import PlannedData
from sweeps.cli.folder_name import Base, folder_of
from sweeps.cli.metrics import check_metrics
from sweeps.search.warnings import check_pruning
from sweeps.spec.check import ends
from sweeps.spec.check_sweep import check_spec, count
from sweeps.spec.rungs import DEFAULT_ETA, rung_epochs
from sweeps.spec.space import baseline
from sweeps.spec.sweep import (
    FIRST_SEED,
    MAX_FAILURES,
    SAMPLERS,
    Scale,
    ScaleName,
    Search,
    SweepSpec,
    build_search,
    build_trials,
    grid_of,
)
from sweeps.state.folder import Sweep

BACKENDS = ("array", "allocation")  # on Slurm
_ASK_ABOVE = 500  # runs of a grid


_RENAMED = {  # options of version 0.1
    "--points": "--max-trials",
    "--engine": "--backend",
    "--engine ray": "--backend allocation",
    "--backend ray": "--backend allocation",
    "--slots-per-node": "--trials-per-node",
}


def parse(spec: SweepSpec, arguments: Sequence[str], command: str = "") -> argparse.Namespace:
    """Parse a sweep's command line; raise ValueError at what --help does not show.

    `command` is what a person types before the arguments; by default `python` and the file.
    """
    command = command or f"python {sys.argv[0] if sys.argv[0].endswith('.py') else f'sweeps/{spec.name}.py'}"
    more = "--max-trials 8" if spec.space else "--seeds 3"
    epilog = f"example:\n  {command} --cluster local {more} --dry-run\n\nRun the same command again to resume; completed trials are kept."
    question = textwrap.fill(spec.question, 100)
    parser = Parser(
        prog=command,
        description=question,
        epilog=epilog,
        keys=lambda: override_keys(spec.task_name),
        renamed=_RENAMED,
        intermixed=True,
    )
    _add_what(parser, spec)
    _add_where(parser)
    _add_search(parser, spec)
    _add_costs(parser, spec)
    return parser.parse_args(arguments)  # type: ignore[no-any-return]


def _add_what(parser: Parser, spec: SweepSpec) -> None:
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set a key for every trial (epochs=5) or of the profile (account=abc)"
    )
    group.add_argument("--scale", choices=[s.name for s in ScaleName], help="default: smoke on this machine, paper on a cluster")
    seeds = "seeds per configuration" + (", at most" if spec.space else "")
    scales = ", ".join(f"{spec.scale(s).seeds} at {s.name} scale" for s in ScaleName)
    group.add_argument("--seeds", type=int, metavar="N", help=f"{seeds} (default: {scales})")
    decided = "where no configuration is the best, add seeds to those that may be, up to N each"
    group.add_argument("--until-decided", type=int, metavar="N", help=f"{decided} (default: no further seeds)")
    retried = "run failed trials again, from their last checkpoint, and probes without a value"
    group.add_argument("--retry-failed", action="store_true", help=retried)
    again = "run all trials on the user's data as they are now, if these have changed since the sweep began"
    group.add_argument("--start-again", action="store_true", help=again)
    kept = "where files of the program have changed since trials began: keep these, and go on with the files as they are"
    group.add_argument("--keep", action="store_true", help=kept)
    group.add_argument(
        "--rerun", action="store_true", help="in that case, run the trials that began with other files again, from the start"
    )
    group.add_argument("--dry-run", action="store_true", help="show trials, cost estimate and batch script; run nothing (needs no Slurm)")


def _add_where(parser: Parser) -> None:
    group = parser.add_argument_group("where and how")
    group.add_argument("--cluster", default="local", metavar="PROFILE", help=f"{PROFILES} (default: %(default)s)")
    group.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of all sweeps (default: the profile's runs_dir)")
    named = "folder of this sweep, in that folder (default: the sweep, the scale, and what the overrides change)"
    group.add_argument("--name", metavar="NAME", help=named)
    backends = "on Slurm: array, one job per trial; allocation, one job in which Ray places many trials"
    group.add_argument("--backend", choices=BACKENDS, help=f"{backends} (default: the queued one, else array)")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of the job, with --backend allocation")
    share = "trials at once on each node, with --backend allocation (default: one per GPU, or per core without GPUs)"
    group.add_argument("--trials-per-node", type=int, metavar="N", help=share)
    group.add_argument("--detach", action="store_true", help="on Slurm: submit and return; the jobs run on their own")
    yes = f"submit, plan a grid of more than {_ASK_ABOVE} runs, or take trials out of the tables without asking"
    group.add_argument("--yes", action="store_true", help=yes)


def _add_search(parser: Parser, spec: SweepSpec) -> None:
    group = parser.add_argument_group("search" if spec.space else "early stopping")
    if spec.space:
        how = f"how configurations are chosen (default: as the search began; at first {SAMPLERS[0]}, or tpe with --two-objectives)"
        group.add_argument("--sampler", choices=SAMPLERS, help=how)
        scales = ", ".join(f"{spec.scale(s).max_trials} at {s.name} scale" for s in ScaleName)
        group.add_argument("--max-trials", type=int, metavar="N", help=f"configurations to try (default: {scales})")
        objectives = "search for high accuracy and few GPU-hours; stop no run early"
        group.add_argument("--two-objectives", action="store_true", help=objectives)
    if spec.space:
        most = f"choose nothing more once N runs have failed or have no value of the objective (default: {MAX_FAILURES})"
        group.add_argument("--max-failures", type=int, metavar="N", help=most)
    default = "asha, or none with --two-objectives and with the samplers grid and gp" if spec.space else "none"
    early = f"compare runs at rungs and stop all but the best (default: {default})"
    group.add_argument("--early-stopping", choices=["asha", "none"], help=early)
    group.add_argument(
        "--eta", type=int, default=DEFAULT_ETA, metavar="N", help="let one run in N continue at each rung (default: %(default)s)"
    )
    names = ", ".join(task_named(spec.task_name).WARNINGS)
    ends = "end a run as pruned when this warning holds at a probe; may be repeated"
    group.add_argument("--prune-on", action="append", default=[], metavar="NAME", help=f"{ends}: {names} (default: none)")


def _add_costs(parser: Parser, spec: SweepSpec) -> None:
    group = parser.add_argument_group("cost limits")
    most = "refuse to submit if the cost estimate is above H GPU-hours (default: no limit)"
    group.add_argument("--max-gpu-hours", type=float, metavar="H", help=most)
    if spec.space:
        budget = "start no run that could take the search above H GPU-hours, or core-hours without GPUs (default: no limit)"
        group.add_argument("--budget-gpu-hours", type=float, metavar="H", help=budget)


def refuse_without_allocation(asked: argparse.Namespace) -> None:
    """Raise ValueError at an option that only --backend allocation takes."""
    for key, value in {"--nodes": asked.nodes, "--trials-per-node": asked.trials_per_node}.items():
        if value is not None:
            raise ValueError(f"{key} must come with --backend allocation on a Slurm cluster; got {value}: add it, or leave {key} out")


def profile_keys(spec: SweepSpec, overrides: Sequence[str]) -> list[str]:
    """Return those of `overrides` that belong to the cluster profile, in full."""
    return [o for o in qualified(overrides, spec.task_name) if o.startswith("cluster.")]


def plan(spec: SweepSpec, asked: argparse.Namespace, data: PlannedData | None = None) -> tuple[Sweep, ClusterProfile]:
    """Plan and check the sweep, starting nothing; raise ValueError at the first broken rule.

    `data` learns what was found out about the images.
    """
    data = data or PlannedData(asked)
    for flag, given in {"--seeds": asked.seeds, "--until-decided": asked.until_decided}.items():
        if given is not None:
            count(given, flag)
    for flag, hours in {"--max-gpu-hours": asked.max_gpu_hours, "--budget-gpu-hours": getattr(asked, "budget_gpu_hours", None)}.items():
        if hours is not None and not 0 < hours < math.inf:
            raise ValueError(f"{flag} must be positive and finite; got {hours:g}")
    local = spec.job(asked.cluster, profile_keys(spec, asked.overrides)).cluster.scheduler is Scheduler.local
    scale = ScaleName[asked.scale] if asked.scale else ScaleName.smoke if local else ScaleName.paper
    chosen = spec.scale(scale)
    check_spec(spec, chosen, scale.name)
    cluster = spec.job(asked.cluster, [*chosen.overrides, *asked.overrides]).cluster
    runs_dir = resolved(asked.runs_dir or Path(cluster.runs_dir), "--runs-dir" if asked.runs_dir else "runs_dir")
    if runs_dir.exists() and not runs_dir.is_dir():
        raise ValueError(f"{'--runs-dir' if asked.runs_dir else 'runs_dir'} must be a folder; got {runs_dir}, a file")
    if not asked.dry_run:
        require_creatable(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    if cluster.scheduler is Scheduler.slurm:
        require_sbatch_path(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    base, seeds = Base(spec, chosen, asked.cluster, profile_keys(spec, asked.overrides)), asked.seeds or chosen.seeds
    path = folder_of(spec, scale, base, asked, runs_dir, lambda: first_ids(spec, chosen, asked, data))
    if spec.space:
        asked.sampler = sampler_for(asked, path)
    values = to_dict(spec.job(asked.cluster, [*chosen.overrides, *asked.overrides]).train)
    rungs = rungs_of(spec, chosen, values, asked)
    if spec.space and not rungs and asked.early_stopping is None and asked.sampler not in ("gp", "grid") and not asked.two_objectives:
        data.lines.append(f"no run is stopped early: {length(values)} {fidelity(values)} leave none at which to compare runs")
    # Where epochs differ, each run gets a probe at its own rungs when it starts.
    at = [] if _given(spec, chosen, fidelity(values)) else rungs
    eta, search = asked.eta if rungs else 0, None
    if spec.space and asked.sampler == "grid":
        for flag, value in {
            "--max-trials": asked.max_trials,
            "--max-failures": asked.max_failures,
            "--budget-gpu-hours": asked.budget_gpu_hours,
        }.items():
            if value is not None:
                raise ValueError(f"{flag} must be left out with --sampler grid, which runs every combination; got {value:g}")
        if asked.two_objectives:
            raise ValueError("--two-objectives must be left out with --sampler grid, which chooses nothing; got both")
        spec = grid_of(spec, chosen, asked.cluster, asked.overrides, data.lines.extend)
        confirm_grid(len(spec.configurations), seeds, path, asked)
    trials = [] if spec.space else build_trials(spec, chosen, seeds, asked.cluster, asked.overrides, at, data.identified)
    until, further, seeds = until_decided.planned(path, trials, seeds, asked.until_decided)
    if spec.space:
        search = plan_search(spec, chosen, asked, at, seeds, data)
        trials = [search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)]
    trials += further
    spec = replace(spec, prune_on=list(dict.fromkeys([*spec.prune_on, *asked.prune_on])))
    sweep = Sweep.of(spec, scale, trials, path, search, rungs, eta)
    sweep.until.extend(until)
    check_metrics(spec, sweep)
    check_pruning(sweep)
    sweep.task.check_seeds(seeds)
    if sweep.objective not in (sweep.task.OBJECTIVE, *sweep.task.MINIMIZED, *sweep.task.HEADLINE, *sweep.task.METRICS):
        rule = f"ranked by {sweep.objective}, of which the highest is best"
        if isinstance(spec.own_task or task_module(spec.task_name), PlainTask):
            data.lines.append(f"{rule}; name it in `minimized` of the task if the lowest is")
    data.compare(sweep)
    return sweep, cluster


def first_ids(spec: SweepSpec, scale: Scale, asked: argparse.Namespace, data: PlannedData) -> set[str]:
    """Return the run IDs of the first seed; of a search, that of the configuration without changes."""
    identified = data.identified
    if not spec.space:
        return {t.signature for t in build_trials(spec, scale, 1, asked.cluster, asked.overrides, identified=identified)}
    if asked.sampler == "grid":
        grid = grid_of(spec, scale, asked.cluster, asked.overrides)
        return {t.signature for t in build_trials(grid, scale, 1, asked.cluster, asked.overrides, identified=identified)}
    options: dict[str, Any] = {"sampler": "random", "max_trials": 1, "seeds": 1, "identified": identified}
    search = build_search(spec, scale, asked.cluster, asked.overrides, [], **options)
    return {search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED).signature}


def sampler_for(asked: argparse.Namespace, path: Path) -> str:
    """Return the sampler that was asked for, else that of the search in `path`, else the default."""
    if asked.two_objectives and asked.sampler == "multi_fidelity":
        raise ValueError("--sampler must be tpe, random or gp with --two-objectives: its model has one objective; got multi_fidelity")
    if asked.sampler:
        return str(asked.sampler)
    file, default = path / "sweep.json", "tpe" if asked.two_objectives else SAMPLERS[0]
    if not file.exists():
        return default
    with reading(file):
        values = checked(dict[str, Any] | None, read_json(file).get("search"), "search")
    begun = Search.from_dict(values).sampler if values else default
    return default if asked.two_objectives and begun == "multi_fidelity" else begun


def confirm_grid(configurations: int, seeds: int, path: Path, asked: argparse.Namespace) -> None:
    """Say the size of a grid before it is planned, and ask if it is large and new; raise ValueError without a yes."""
    runs = configurations * seeds
    print(f"grid: {configurations:,} configurations, seeds of each: {seeds}; {runs:,} runs in all", flush=True)
    if runs <= _ASK_ABOVE or asked.yes or asked.dry_run or (path / "sweep.json").exists():
        return
    agreed = sys.stdin.isatty() and input(f"that is more than {_ASK_ABOVE} runs; plan them? [y/N] ").strip().lower() in ("y", "yes")
    if not agreed:
        rule = f"--sampler grid must have at most {_ASK_ABOVE} runs, or be confirmed"
        raise ValueError(f"{rule}; got {runs:,}: add --yes, give fewer values or --seeds, or choose another --sampler")


def rungs_of(spec: SweepSpec, scale: Scale, values: dict[str, Any], asked: argparse.Namespace) -> list[int]:
    """Return the epochs at which runs are compared, after any warm-up; [] if nothing is stopped. `values` are those of the base."""
    # A grid chooses nothing; gp and two objectives learn from completed runs only.
    default = "asha" if spec.space and asked.sampler not in ("gp", "grid") and not asked.two_objectives else "none"
    if spec.space and asked.two_objectives and asked.early_stopping == "asha":
        raise ValueError("--early-stopping must be none with --two-objectives: a run that was stopped has no accuracy; got asha")
    if (asked.early_stopping or default) == "none":
        return []
    if asked.eta < 2:
        raise ValueError(f"--eta must be at least 2; got {asked.eta}")
    longest, key = 0.0, task_of(values).KEYS.get("warmup_epochs")
    if key is not None:
        longest = max(lookup(values, key), *_given(spec, scale, key), 0.0)
    epochs = int(max([length(values), *_given(spec, scale, fidelity(values))]))
    found = rung_epochs(epochs, longest, asked.eta)
    if not found and key is None and asked.early_stopping is None:
        return []
    if not found:
        rule = f"leave an epoch between the warm-up of {longest:g} and {epochs} / {asked.eta}"
        raise ValueError(f"--early-stopping=asha must {rule}; got none: use more epochs, or --early-stopping none")
    return found


def _given(spec: SweepSpec, scale: Scale, key: str) -> list[float]:
    """Return the numbers that the sweep's configurations, options and bounds give for `key`."""
    given = [c.overrides[key] for c in spec.configurations_at(scale) if key in c.overrides]
    given += [value for d in spec.space_at(scale) if d.key == key for value in ends(d)]
    return [float(value) for value in given if isinstance(value, (int, float))]


def plan_search(spec: SweepSpec, scale: Scale, asked: argparse.Namespace, rungs: list[int], seeds: int, data: PlannedData) -> Search:
    """Plan the search; raise ValueError if an option makes no sense, or its space does not."""
    max_trials = count(scale.max_trials, "max_trials of the scale") if asked.max_trials is None else count(asked.max_trials, "--max-trials")
    failures = MAX_FAILURES if asked.max_failures is None else count(asked.max_failures, "--max-failures")
    return build_search(
        spec,
        scale,
        asked.cluster,
        asked.overrides,
        rungs,
        sampler=asked.sampler,
        max_trials=max_trials,
        seeds=seeds,
        costs=asked.two_objectives,
        budget_hours=asked.budget_gpu_hours,
        max_failures=failures,
        identified=data.identified,
        say=data.lines.extend,
    )
