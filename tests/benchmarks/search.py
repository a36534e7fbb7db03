"""What a search costs and how often it is right, replayed on recorded learning curves: each sampler, with early stopping or not.

    python tests/benchmarks/search.py [--set digits] [--json] [--seeds 50] [--first 0] [--jobs 2] [--slots 4] [--all] [--only TEXT ...]

A set of curves (_curve_sets.py) holds a grid of configurations x 3 seeds, trained to the end by record_curves.py. The sampler was tuned on
`digits`; `fashion` was never looked at. The real engine replays a search on 4 workers under a simulated clock; a configuration between
recorded ones scores as the nearest, and each replay deals the recorded seeds again. A winner is right if its mean over all recorded seeds
is within one standard error of the best. Epochs are shares of those of the full grid with one seed. Every search has a budget of
REQUIRED_SHARE of them, or of SMALL_SHARE. Each strategy is compared with the model's in the same replays. On shuffled labels every
configuration has the curves of another, so that no sampler can learn anything.
Status 1 where the default is right in less than REQUIRED_RIGHT of the replays.
--all replays also the choices that the defaults were compared with. --only keeps the strategies whose names contain one of the texts.
"""

import argparse
import dataclasses
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _curve_sets import SETS, Configuration, CurveSet, run_name
from _report import publish
from _simulated import Simulation
from rich.table import Table

from sweeps.search.configurations import Tried, tried
from sweeps.spec.rungs import DEFAULT_ETA, rung_epochs
from sweeps.spec.space import Params, baseline
from sweeps.spec.sweep import FIRST_SEED, SAMPLERS, Scale, ScaleName, SweepSpec, Trial, build_search
from sweeps.state.folder import Sweep

REQUIRED_SHARE, SMALL_SHARE, REQUIRED_RIGHT = 0.25, 0.12, 0.8


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How configurations are chosen, how many, and at which epochs all but the best 1/eta are stopped."""

    name: str
    sampler: str
    eta: int
    rungs: tuple[int, ...]
    max_trials: int
    seeds: int
    share: float = REQUIRED_SHARE
    shuffled: bool = False


EPOCHS = 27  # of each run of each set
RUNGS = tuple(rung_epochs(EPOCHS, 1, DEFAULT_ETA))
NAMES = {"multi_fidelity": "multi-fidelity", "random": "random", "tpe": "TPE", "gp": "GP"}


def with_asha(sampler: str, share: float = REQUIRED_SHARE, shuffled: bool = False) -> Strategy:
    """`sampler` with the default early stopping; all samplers try as many configurations."""
    max_trials, seeds = (20, 3) if share == REQUIRED_SHARE else (9, 2)
    what = ", labels shuffled" if shuffled else "" if share == REQUIRED_SHARE else f", {100 * share:.0f} %"
    return Strategy(f"{NAMES[sampler]} + ASHA{what}", sampler, DEFAULT_ETA, RUNGS, max_trials, seeds, share, shuffled)


DEFAULT = with_asha(SAMPLERS[0])
STRATEGIES = [
    DEFAULT,
    *(with_asha(sampler) for sampler in NAMES if sampler != DEFAULT.sampler),
    *(Strategy(f"{NAMES[sampler]}, to the end", sampler, 0, (), 12, 3) for sampler in ("random", "tpe", "gp")),
    *(with_asha(sampler, SMALL_SHARE) for sampler in NAMES),
    *(with_asha(sampler, shuffled=True) for sampler in ("multi_fidelity", "random")),
]
# What the defaults were chosen from.
CONSIDERED = [
    Strategy(f"{sampler} + ASHA eta {eta} at {rungs}, {n} configurations, {seeds} seeds", sampler, eta, rungs, n, seeds)
    for sampler in ("multi_fidelity", "tpe", "random")
    for eta, rungs, n in ((2, (6, 13), 14), (3, (3, 9), 24), (3, (9,), 16), (4, (6,), 16))
    for seeds in (2, 3)
]


class Recorded:
    """What a set of curves says of its configurations, and what a replay makes of it."""

    def __init__(self, made: CurveSet) -> None:
        """Read the curves."""
        self.set, self.curves, self.configurations = made, made.curves(), made.configurations()

    def value(self, configuration: Configuration, seed: int, epoch: int) -> float:
        """Percent after an epoch; of a run that had failed by then, the worst of all."""
        found = self.curves[run_name(configuration, seed)].get(str(epoch))
        return self.worst(epoch) if found is None else found

    @cache  # noqa: B019, there are two sets
    def worst(self, epoch: int) -> float:
        """The lowest percent of any run after an epoch."""
        return min(curve[str(epoch)] for curve in self.curves.values() if str(epoch) in curve)

    @cache  # noqa: B019
    def mean(self, configuration: Configuration) -> float:
        """Of a configuration at its end, over all recorded seeds."""
        return statistics.fmean(self.value(configuration, seed, EPOCHS) for seed in self.set.seeds)

    @property
    def best(self) -> float:
        """The highest mean."""
        return max(map(self.mean, self.configurations))

    @cache  # noqa: B019
    def standard_error(self) -> float:
        """Of a mean, over the better half of the configurations, less what a seed does to all of them: they share their seeds."""
        seeds, half = self.set.seeds, sorted(self.configurations, key=self.mean)[len(self.configurations) // 2 :]
        of_seed = {seed: statistics.fmean(self.value(s, seed, EPOCHS) for s in half) for seed in seeds}
        overall = statistics.fmean(of_seed.values())
        left = [self.value(s, seed, EPOCHS) - self.mean(s) - of_seed[seed] + overall for s in half for seed in seeds]
        variance = sum(r * r for r in left) / ((len(half) - 1) * (len(seeds) - 1))
        return math.sqrt(variance / len(seeds))

    def is_right(self, configuration: Configuration) -> bool:
        """Whether the configuration is within one standard error of the best."""
        return self.mean(configuration) >= self.best - self.standard_error()

    @cache  # noqa: B019
    def of_seed(self, seed: int, epoch: int) -> float:
        """What all configurations have in common at that seed and epoch: its held-out images are easier or harder."""
        return statistics.fmean(self.value(s, seed, epoch) for s in self.configurations)

    @cache  # noqa: B019
    def shuffle_of(self, replay: int) -> dict[Configuration, Configuration]:
        """Whose curves each configuration has on the shuffled labels of a replay."""
        dealt = list(self.configurations)
        random.Random(f"shuffled {replay}").shuffle(dealt)
        return dict(zip(self.configurations, dealt, strict=True))

    def scored_as(self, params: Params, replay: int, shuffled: bool) -> Configuration:
        """The recorded configuration whose curves a chosen one has."""
        nearest = self.set.nearest(params)
        return self.shuffle_of(replay)[nearest] if shuffled else nearest

    def replayed_value(self, params: Params, number: int, epoch: int, replay: int, shuffled: bool = False) -> float:
        """What the chosen configuration scores after an epoch with its seed `number`.

        Two that are near the same recorded one are not the same run: each is dealt one of its recorded seeds, for what is its own of a
        curve. Which recorded seed stands for the search's n-th, for what a seed does to all, is dealt again for each replay.
        """
        order, own = list(self.set.seeds), list(self.set.seeds)
        random.Random(replay).shuffle(order)
        random.Random(f"{replay} {params}").shuffle(own)
        dealt = own[number % len(own)]
        known = self.value(self.scored_as(params, replay, shuffled), dealt, epoch)
        return known - self.of_seed(dealt, epoch) + self.of_seed(order[number % len(order)], epoch)


@cache
def recorded(name: str) -> Recorded:
    """The set of that name."""
    return Recorded(SETS[name])


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of one replayed search."""

    share: float  # of the grid's epochs
    share_to_right: float | None  # when a right configuration first led by its mean
    right: bool
    best: bool  # the very best configuration won
    regret: float  # points below the best
    runs: int


def grid(known: Recorded, replay: int) -> Replay:
    """Every configuration once, with one seed, as the paper did."""

    def score(configuration: Configuration) -> float:
        return known.replayed_value(dict(zip(known.set.grid, configuration, strict=True)), 0, EPOCHS, replay)

    winner = max(known.configurations, key=score)
    right, mean = known.is_right(winner), known.mean(winner)
    return Replay(1.0, 1.0 if right else None, right, mean == known.best, known.best - mean, len(known.configurations))


def replayed(name: str, strategy: Strategy, workers: int, replay: int) -> Replay:
    """One search of the set `name` by the real engine."""
    known, rungs = recorded(name), list(strategy.rungs)
    scale = Scale(known.set.overrides, 1)
    spec = SweepSpec("replay", "?", space=known.set.space, smoke=scale, paper=scale)
    budget = strategy.share * len(known.configurations) * EPOCHS
    options: dict[str, Any] = {
        "sampler": strategy.sampler,
        "max_trials": strategy.max_trials,
        "seeds": strategy.seeds,
        "budget_hours": budget,
    }
    search = build_search(spec, spec.smoke, "local", [], rungs, **options)
    # The digest seeds the sampler; an epoch costs an hour.
    search = dataclasses.replace(search, digest=f"{replay:012x}", hours_per_epoch=1.0)

    def leader(found: list[Tried]) -> Configuration:
        return known.scored_as(max(found, key=lambda p: p.mean).trials[0].params, replay, strategy.shuffled)

    with tempfile.TemporaryDirectory() as temporary:
        first = search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)
        sweep = Sweep.of(spec, ScaleName.smoke, [first], Path(temporary) / "replay-smoke", search, rungs, strategy.eta)
        sweep.write()

        def curve(trial: Trial, epoch: int) -> float:
            return known.replayed_value(trial.params, trial.seed - FIRST_SEED, epoch, replay, strategy.shuffled)

        simulation = Simulation(sweep, curve, workers, random.Random(replay))
        total, to_right = len(known.configurations) * EPOCHS, None
        for _ in simulation.run():
            leading = [p for p in tried(simulation.view) if p.scores]
            if leading and to_right is None and known.is_right(leader(leading)):
                to_right = simulation.epochs_trained / total
        winner = leader([p for p in tried(simulation.view) if p.scores])
    mean = known.mean(winner)
    return Replay(
        simulation.epochs_trained / total, to_right, known.is_right(winner), mean == known.best, known.best - mean, simulation.ended
    )


def summary(name: str, replays: Sequence[Replay]) -> dict[str, Any]:
    """Of all replays of a strategy."""
    reached = [r.share_to_right if r.share_to_right is not None else math.inf for r in replays]
    quartiles = statistics.quantiles([r.share for r in replays], n=4)
    median = statistics.median(reached)
    return {
        "strategy": name,
        "replays": len(replays),
        "runs": round(statistics.fmean(r.runs for r in replays), 1),
        "share_of_grid": round(statistics.median(r.share for r in replays), 3),
        "share_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "share_most": round(max(r.share for r in replays), 3),
        "share_to_right_median": round(median, 3) if math.isfinite(median) else None,
        "right": round(statistics.fmean(r.right for r in replays), 3),
        "right_within_a_quarter": round(statistics.fmean(r.right and r.share <= REQUIRED_SHARE for r in replays), 3),
        "wrong_winner": round(1 - statistics.fmean(r.best for r in replays), 3),
        "regret_mean": round(statistics.fmean(r.regret for r in replays), 2),
    }


def compared(ours: Sequence[Replay], others: Sequence[Replay]) -> dict[str, list[float]]:
    """The mean of ours minus the other's in the same replays, with a 95 % interval: share of right winners, and points below the best."""
    found = {}
    for name in ("right", "regret"):
        apart = [float(getattr(a, name)) - float(getattr(b, name)) for a, b in zip(ours, others, strict=True)]
        half = 1.96 * statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf
        found[name] = [round(statistics.fmean(apart) + k * half, 3) for k in (0, -1, 1)]
    return found


def shown(figures: dict[str, Any]) -> tuple[Table, list[str]]:
    """The figures for a terminal."""
    heads = [
        "strategy",
        "runs",
        "epochs of the grid",
        "quartiles",
        "to a right leader",
        "right",
        "right, <= 25 %",
        "not the best",
        "points short",
    ]
    table = Table(*heads, title=f"Searches replayed on the recorded curves of {figures['set']}")
    for line in figures["strategies"]:
        reached = line["share_to_right_median"]
        low, high = line["share_quartiles"]
        table.add_row(
            line["strategy"],
            f"{line['runs']:g}",
            f"{100 * line['share_of_grid']:.0f} %",
            f"{100 * low:.0f} to {100 * high:.0f} %",
            "-" if reached is None else f"{100 * reached:.0f} %",
            f"{100 * line['right']:.0f} %",
            f"{100 * line['right_within_a_quarter']:.0f} %",
            f"{100 * line['wrong_winner']:.0f} %",
            f"{line['regret_mean']:.2f}",
        )
    notes = []
    for line in figures["compared"]:
        (mean, low, high), (regret, least, most) = line["right"], line["regret"]
        right = f"right {100 * mean:+.0f} points ({100 * low:+.0f} to {100 * high:+.0f})"
        notes.append(f"{line['strategy']} - {line['with']}: {right}, points short {regret:+.2f} ({least:+.2f} to {most:+.2f})")
    counts = f"{figures['right_configurations']} of {figures['configurations']} configurations are right"
    return table, [*notes, f"{counts}: within {figures['standard_error']} points of {figures['best']:.1f} %"]


def main() -> int:
    """Replay, and print a line a strategy."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--set", choices=SETS, default="digits", help="which curves")
    parser.add_argument("--seeds", type=int, default=50, help="replays of each strategy")
    parser.add_argument("--first", type=int, default=0, help="number of the first replay; the defaults were chosen on 0 to 49")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--slots", dest="workers", type=int, default=4)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="strategies whose names contain one of these")
    asked = parser.parse_args()
    strategies = [s for s in STRATEGIES + (CONSIDERED if asked.all else []) if s == DEFAULT or any(text in s.name for text in asked.only)]
    numbers = range(asked.first, asked.first + asked.seeds)
    known = recorded(asked.set)
    lines = [summary("full grid, one seed", [grid(known, r) for r in numbers])]
    found: dict[Strategy, list[Replay]] = {}
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        pending = {strategy: [pool.submit(replayed, asked.set, strategy, asked.workers, r) for r in numbers] for strategy in strategies}
        for strategy, futures in pending.items():
            found[strategy] = [f.result() for f in futures]
            lines.append(summary(strategy.name, found[strategy]))
    by_default = lines[1]
    figures = {
        "epochs_share_of_grid": by_default["share_of_grid"],
        "success_rate": by_default["right"],
        "strategies": lines,
        "compared": [
            {"strategy": ours.name, "with": other.name, **compared(found[ours], found[other])}
            for ours in found
            for other in found
            if ours.sampler == DEFAULT.sampler and ours != other and (ours.share, ours.shuffled) == (other.share, other.shuffled)
        ],
        "set": asked.set,
        "configurations": len(known.configurations),
        "right_configurations": sum(map(known.is_right, known.configurations)),
        "best": known.best,
        "standard_error": round(known.standard_error(), 2),
    }
    publish(asked.json, asked.seeds, figures, *shown(figures))
    return 0 if by_default["right_within_a_quarter"] >= REQUIRED_RIGHT else 1


if __name__ == "__main__":
    sys.exit(main())
