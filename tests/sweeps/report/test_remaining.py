"""The time left of simulated sweeps against what they then take: uneven costs, several workers, failures, searches that stop runs."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sweeps.report.remaining import Ended, Remaining, Running, Waiting


@dataclass
class Simulated:
    """A trial as it will be."""

    configuration: str
    length: float
    pace: float  # seconds per unit of its length
    startup: float = 5.0
    tail: float = 10.0
    stops: float = 1.0  # share at which it ends early
    judged: bool = True
    start: float = 0.0

    @property
    def seconds(self) -> float:
        return self.startup + self.length * self.pace * self.stops + (self.tail if self.stops == 1.0 else 0.0)

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass
class Timeline:
    """A sweep that was run to its end."""

    trials: list[Simulated]
    workers: int
    gap: float
    rounds: int = 0  # of further seeds at its end

    @property
    def end(self) -> float:
        return max(t.end for t in self.trials)

    def left(self, now: float, hidden: int = 0) -> float | None:
        """What is estimated at a time; the last `hidden` trials are the further seeds of a search, which nobody has chosen yet."""
        ended = [
            Ended(t.configuration, t.length, t.seconds, t.stops == 1.0, t.stops, t.tail if t.stops == 1 else None, t.start, t.end)
            for t in self.trials
            if t.end <= now
        ]
        going = [t for t in self.trials if t.start <= now < t.end]
        last = len(self.trials) - hidden
        ahead = [t for t in self.trials[:last] if t.start > now]
        found = Remaining(ended, [running(t, now) for t in going])
        seeds = [hidden // self.rounds] * self.rounds if hidden and any(t.end > now for t in self.trials[:last]) else []
        ahead += [] if seeds else [t for t in self.trials[last:] if t.start > now]
        return found.of_sweep([Waiting(t.configuration, t.length, judged=t.judged) for t in ahead], self.workers, seeds)


def running(t: Simulated, now: float) -> Running:
    """A trial as it is seen after each hundredth of its length."""
    training = max(now - t.start - t.startup, 0.0)
    share = min(int(100 * training / (t.length * t.pace)) / 100, t.stops)
    trained_at = share * t.length * t.pace
    return Running(t.configuration, t.length, share, now - t.start, share, trained_at, training - trained_at, t.judged, t.start)


def run(trials: list[Simulated], workers: int, gap: float, chance: random.Random, rounds: int = 0, hidden: int = 0) -> Timeline:
    """Deal the trials out to the workers; the further seeds begin when all others have ended."""
    free = [0.0] * workers
    for number, t in enumerate(trials):
        if hidden and number >= len(trials) - hidden and (number - len(trials) + hidden) % (hidden // rounds) == 0:
            free = [max(free)] * workers
        t.start = heapq.heappop(free) + gap * chance.uniform(0.7, 1.3)
        heapq.heappush(free, t.end)
    return Timeline(trials, workers, gap, rounds)


def uneven(chance: random.Random) -> Timeline:
    """Eleven configurations with costs from 1 to 6, two seeds, on four workers, 5 % noise."""
    costs = [chance.uniform(1, 6) for _ in range(11)]
    trials = [Simulated(f"c{i}", 50, cost * chance.gauss(1, 0.05)) for _ in range(2) for i, cost in enumerate(costs)]
    return run(trials, 4, 3, chance)


def failing(chance: random.Random) -> Timeline:
    """The same, of whose trials every fifth fails somewhere, and every tenth at once."""
    found = uneven(chance).trials
    for number, t in enumerate(found):
        t.stops = {3: chance.random(), 8: 0.01}.get(number % 10, 1.0)
    return run(found, 3, 8, chance)


def lengths(chance: random.Random) -> Timeline:
    """Three seeds of six configurations that train for 10 to 80 epochs, on two workers."""
    trials = [Simulated(f"c{i}", n, 2 * chance.gauss(1, 0.05)) for _ in range(3) for i, n in enumerate((10, 20, 40, 80, 40, 20))]
    return run(trials, 2, 2, chance)


def at_once(chance: random.Random) -> Timeline:
    """As many workers as trials, so that none has ended when half the time is over."""
    return run([Simulated(f"c{i}", 100, cost) for i, cost in enumerate((3, 4, 5, 6))], 4, 0, chance)


def search(chance: random.Random) -> Timeline:
    """Forty configurations, of which rungs at 1/9 and 1/3 let a third continue; then two further seeds of three of them."""
    stops = [1 / 9 if chance.random() > 1 / 3 else 1 / 3 if chance.random() > 1 / 3 else 1.0 for _ in range(40)]
    trials = [Simulated(f"c{i}", 90, chance.uniform(1, 2), stops=stop) for i, stop in enumerate(stops)]
    trials += [Simulated(f"c{i}", 90, 1.5, judged=False) for _ in range(2) for i in range(3)]
    return run(trials, 4, 2, chance, rounds=2, hidden=6)


SWEEPS: list[Callable[[random.Random], Timeline]] = [uneven, failing, lengths, at_once, search]


def worst(made: Callable[[random.Random], Timeline], seed: int) -> list[tuple[float, float, float | None]]:
    """Time, truth and estimate at 20 moments from half-way on."""
    found = made(random.Random(seed))
    hidden = 6 if made is search else 0
    return [(now, found.end - now, found.left(now, hidden)) for now in (found.end * (0.5 + 0.45 * i / 19) for i in range(20))]


@pytest.mark.parametrize("made", [uneven, lengths, at_once])
def test_from_half_way_on_the_time_left_is_within_30_percent(made: Callable[[random.Random], Timeline]) -> None:
    for seed in range(20):
        for now, truth, said in worst(made, seed):
            assert said is not None
            assert abs(said - truth) < 0.3 * truth, (seed, now, truth, said)


@pytest.mark.parametrize("made", [failing, search])
def test_where_trials_end_early_it_nearly_always_is(made: Callable[[random.Random], Timeline]) -> None:
    """When one fails, or which ones a rung lets pass, nobody can know."""
    looks = [look for seed in range(20) for look in worst(made, seed)]
    wrong = [(now, truth, said) for now, truth, said in looks if said is None or abs(said - truth) > 0.3 * truth]
    assert len(wrong) < 0.04 * len(looks), wrong


def test_without_anything_to_learn_from_nothing_is_said() -> None:
    fresh = Running("a", 10, 0.0, 5.0)
    assert Remaining([], [fresh]).of(fresh) is None
    assert Remaining([], [fresh]).of_sweep([], 1) is None
    assert Remaining([], []).of_sweep([Waiting("a", 10)], 0) is None
    assert Remaining([Ended("a", 10, 100.0, True)], []).of_sweep([Waiting("a", 10)], 0) is None, "nothing runs"
    assert Remaining([], []).of_sweep([], 0) == 0.0


def test_a_trial_takes_as_long_as_others_of_its_configuration_and_then_its_own_speed_tells() -> None:
    past = [Ended("a", 10, 100.0, True, tail=20.0), Ended("b", 10, 400.0, True, tail=20.0)]
    begins = Running("b", 10, 0.0, 10.0)
    assert Remaining(past, [begins]).of(begins) == pytest.approx(390.0)
    slow = Running("b", 10, 0.9, 900.0, trained=0.9, training=810.0)
    assert Remaining(past, [slow]).of(slow) == pytest.approx(90.0 + 20.0)
    probing = Running("b", 10, 1.0, 390.0, since_step=5.0)
    assert Remaining(past, [probing]).of(probing) == pytest.approx(15.0)
    resumed = Running("c", 10, 0.75, 100.0, trained=0.25, training=50.0)
    assert Remaining([], [resumed]).of(resumed) == pytest.approx(50.0), "the speed is that of this attempt"


def test_trials_that_wait_are_dealt_out_to_the_workers() -> None:
    past = [Ended("a", 10, 100.0, True)]
    half = Running("a", 10, 0.5, 50.0, trained=0.5, training=50.0)
    waiting = [Waiting("a", 10)] * 3
    assert Remaining(past, [half]).of_sweep(waiting, 1) == pytest.approx(350.0)
    assert Remaining(past, [half]).of_sweep(waiting, 2) == pytest.approx(200.0)
    assert Remaining(past, [half]).of_sweep([Waiting("a", 10, share=0.5)], 1) == pytest.approx(100.0)
    assert Remaining(past, [half]).of_sweep([], 2, rounds=[3, 3]) == pytest.approx(50.0 + 2 * 200.0)


def test_the_time_between_two_trials_of_a_worker_counts() -> None:
    past = [Ended("a", 10, 100.0, True, start=1.0 + i * 130, end=101.0 + i * 130) for i in range(4)]
    now = Running("a", 10, 0.5, 50.0, trained=0.5, training=50.0, start=521.0)
    assert Remaining(past, [now]).of_sweep([Waiting("a", 10)] * 2, 1) == pytest.approx(50.0 + 2 * 130.0)


def test_trials_that_end_early_shorten_what_is_expected_of_others() -> None:
    past = [*[Ended("a", 10, 100.0, True)] * 2, *[Ended("a", 10, 30.0, False, 0.25)] * 2]
    never = Remaining(past, []).of_sweep([Waiting("a", 10, judged=False)], 1)
    assert never == pytest.approx(100.0)
    assert Remaining(past, []).of_sweep([Waiting("a", 10)], 1) == pytest.approx(100.0 * (0.25 + 0.5 * 0.75))
