"""Turn a command line into a planned and checked sweep: trials or a search, rungs, cluster."""

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnjepa.run.files import read_json, reading
from cnnjepa.run.identity import from_dict, lookup, to_dict
from cnnjepa.run.typed import checked
from jobs.cli import Parser, require_writable, resolved
from jobs.cluster import ClusterProfile, Scheduler, require_sbatch_path
from jobs.config import PROFILES, override_keys, qualified
from jobs.task import task_named, task_of
from sweeps.cli.data import PlannedData
from sweeps.search.rungs import DEFAULT_ETA, rung_epochs
from sweeps.search.warnings import check_pruning
from sweeps.spec.space import applied, baseline
from sweeps.spec.sweep import FIRST_SEED, SAMPLERS, Scale, ScaleName, Search, SweepSpec, build_search, build_trials, grid_of
from sweeps.state.folder import Sweep

BACKENDS = ("array", "allocation")  # on Slurm
_MOST = 100_000  # seeds or configurations; catches a typo before hours of planning


def _and_at_most(value: int) -> str:
    return f" and at most {_MOST}" if value > _MOST else ""


_RENAMED = {  # options of version 0.1
    "--points": "--max-trials",
    "--engine": "--backend",
    "--engine ray": "--backend allocation",
    "--backend ray": "--backend allocation",
    "--slots-per-node": "--trials-per-node",
}


def parse(spec: SweepSpec, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a sweep's command line; raise ValueError at what --help does not show."""
    file = sys.argv[0] if sys.argv[0].endswith(".py") else f"sweeps/{spec.name}.py"
    command = f"python {file}"
    more = "--max-trials 8" if spec.space else "--seeds 3"
    epilog = f"example:\n  {command} --cluster local {more} --dry-run\n\nRun the same command again to resume; completed trials are kept."
    question = textwrap.fill(spec.question, 100)
    parser = Parser(prog=command, description=question, epilog=epilog, keys=lambda: override_keys(spec.task), renamed=_RENAMED)
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
    retried = "run failed trials again, from their last checkpoint, and probes without a value"
    group.add_argument("--retry-failed", action="store_true", help=retried)
    again = "run all trials on the user's images as they are now, if these have changed since the sweep began"
    group.add_argument("--start-again", action="store_true", help=again)
    group.add_argument("--dry-run", action="store_true", help="show trials, cost estimate and batch script; run nothing (needs no Slurm)")


def _add_where(parser: Parser) -> None:
    group = parser.add_argument_group("where and how")
    group.add_argument("--cluster", default="local", metavar="PROFILE", help=f"{PROFILES} (default: %(default)s)")
    group.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of all sweeps (default: the profile's runs_dir)")
    backends = "on Slurm: array, one job per trial; allocation, one job in which Ray places many trials"
    group.add_argument("--backend", choices=BACKENDS, help=f"{backends} (default: the queued one, else array)")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of the job, with --backend allocation")
    share = "trials at once on each node, with --backend allocation (default: one per GPU, or per core without GPUs)"
    group.add_argument("--trials-per-node", type=int, metavar="N", help=share)
    group.add_argument("--detach", action="store_true", help="on Slurm: submit and return; the jobs run on their own")
    group.add_argument("--yes", action="store_true", help="submit without asking")


def _add_search(parser: Parser, spec: SweepSpec) -> None:
    group = parser.add_argument_group("search" if spec.space else "early stopping")
    if spec.space:
        how = f"how configurations are chosen (default: as the search began; at first {SAMPLERS[0]}, or tpe with --two-objectives)"
        group.add_argument("--sampler", choices=SAMPLERS, help=how)
        scales = ", ".join(f"{spec.scale(s).max_trials} at {s.name} scale" for s in ScaleName)
        group.add_argument("--max-trials", type=int, metavar="N", help=f"configurations to try (default: {scales})")
        objectives = "search for high accuracy and few GPU-hours; stop no run early"
        group.add_argument("--two-objectives", action="store_true", help=objectives)
    default = "asha, or none with --two-objectives and with the samplers grid and gp" if spec.space else "none"
    early = f"compare runs at rungs and stop all but the best (default: {default})"
    group.add_argument("--early-stopping", choices=["asha", "none"], help=early)
    group.add_argument(
        "--eta", type=int, default=DEFAULT_ETA, metavar="N", help="let one run in N continue at each rung (default: %(default)s)"
    )
    names = ", ".join(task_named(spec.task).WARNINGS)
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
    return [o for o in qualified(overrides, spec.task) if o.startswith("cluster.")]


def plan(spec: SweepSpec, asked: argparse.Namespace, data: PlannedData | None = None) -> tuple[Sweep, ClusterProfile]:
    """Plan and check the sweep, starting nothing; raise ValueError at the first broken rule.

    `data` learns what was found out about the images.
    """
    data = data or PlannedData(asked)
    if asked.seeds is not None and not 1 <= asked.seeds <= _MOST:
        raise ValueError(f"--seeds must be at least 1{_and_at_most(asked.seeds)}; got {asked.seeds}")
    local = spec.job(asked.cluster, profile_keys(spec, asked.overrides)).cluster.scheduler is Scheduler.local
    scale = ScaleName[asked.scale] if asked.scale else ScaleName.smoke if local else ScaleName.paper
    chosen = spec.scale(scale)
    cluster = spec.job(asked.cluster, [*chosen.overrides, *asked.overrides]).cluster
    runs_dir = resolved(asked.runs_dir or Path(cluster.runs_dir), "--runs-dir" if asked.runs_dir else "runs_dir")
    if not asked.dry_run:
        require_writable(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    if cluster.scheduler is Scheduler.slurm:
        require_sbatch_path(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    if not re.fullmatch(r"\w[\w.-]*", spec.name):
        raise ValueError(f"a sweep's name must be letters, digits, _, . and -, since it names a folder and jobs; got {spec.name!r}")
    path, seeds = runs_dir / f"{spec.name}-{scale.name}", asked.seeds or chosen.seeds
    if spec.space:
        asked.sampler = sampler_for(asked, path)
    rungs = rungs_of(spec, chosen, asked)
    eta, search = asked.eta if rungs else 0, None
    if spec.space and asked.sampler == "grid":
        for flag, value in {"--max-trials": asked.max_trials, "--budget-gpu-hours": asked.budget_gpu_hours}.items():
            if value is not None:
                raise ValueError(f"{flag} must be left out with --sampler grid, which runs every combination; got {value:g}")
        if asked.two_objectives:
            raise ValueError("--two-objectives must be left out with --sampler grid, which chooses nothing; got both")
        spec, path = grid_of(spec, chosen, asked.cluster, asked.overrides), path.with_name(f"{path.name}-grid")
    if spec.space:
        search = plan_search(spec, chosen, asked, rungs, seeds, data)
        trials = [search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)]
    else:
        trials = build_trials(spec, chosen, seeds, asked.cluster, asked.overrides, rungs, data.identified)
    spec = replace(spec, prune_on=list(dict.fromkeys([*spec.prune_on, *asked.prune_on])))
    sweep = Sweep.of(spec, scale, trials, path, search, rungs, eta)
    check_pruning(sweep)
    sweep.task.check_objective(sweep.objective, sweep.trials[0].values)
    data.compare(sweep)
    return sweep, cluster


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


def rungs_of(spec: SweepSpec, scale: Scale, asked: argparse.Namespace) -> list[int]:
    """Return the epochs at which runs are compared, after any warm-up; [] if nothing is stopped."""
    # A grid chooses nothing; gp and two objectives learn from completed runs only.
    default = "asha" if spec.space and asked.sampler not in ("gp", "grid") and not asked.two_objectives else "none"
    if spec.space and asked.two_objectives and asked.early_stopping == "asha":
        raise ValueError("--early-stopping must be none with --two-objectives: a run that was stopped has no accuracy; got asha")
    if (asked.early_stopping or default) == "none":
        return []
    if asked.eta < 2:
        raise ValueError(f"--eta must be at least 2; got {asked.eta}")
    train = spec.job(asked.cluster, [*scale.overrides, *asked.overrides]).train
    longest, key = 0.0, task_of(train).KEYS.get("warmup_epochs")
    if key is not None:
        swept = [d for d in spec.space_at(scale) if d.key == key]
        given = [float(s.overrides.get(key, 0)) for s in spec.configurations_at(scale)]
        longest = max([lookup(to_dict(train), key), *given, *(max([d.high, *map(float, d.options)]) for d in swept)])
    found = rung_epochs(train.epochs, longest, asked.eta)
    if not found:
        rule = f"leave an epoch between the warm-up of {longest:g} and {train.epochs} / {asked.eta}"
        raise ValueError(f"--early-stopping=asha must {rule}; got none: use more epochs, or --early-stopping none")
    return found


def plan_search(spec: SweepSpec, scale: Scale, asked: argparse.Namespace, rungs: list[int], seeds: int, data: PlannedData) -> Search:
    """Plan the search; raise ValueError if a border of its space cannot be trained."""
    max_trials, budget = scale.max_trials if asked.max_trials is None else asked.max_trials, asked.budget_gpu_hours
    if not 1 <= max_trials <= _MOST:
        raise ValueError(f"--max-trials must be at least 1{_and_at_most(max_trials)}; got {max_trials}")
    if budget is not None and not 0 < budget < float("inf"):
        raise ValueError(f"--budget-gpu-hours must be positive and finite; got {budget:g}")
    options = {"max_trials": max_trials, "seeds": seeds, "costs": asked.two_objectives, "budget_hours": budget}
    search = build_search(spec, scale, asked.cluster, asked.overrides, rungs, sampler=asked.sampler, identified=data.identified, **options)
    start = baseline(search.space, search.base)
    for d in search.space:
        for value in d.options or ((int(d.low), int(d.high)) if d.whole else (d.low, d.high)):
            if d.key in start:
                task_of(search.base).validate(from_dict(applied(search.base, {**start, d.key: value}, FIRST_SEED)))
    return search
