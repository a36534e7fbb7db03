"""Estimate how long a sweep still takes, from the trials that have ended and the progress of those that run.

A trial takes as long as others of its configuration took, or where none is known as the mean of the
configurations, in proportion to its length. One that runs is also judged by its own speed, the more
the further it is. Trials that end early, pruned or failed, are counted by how far such trials got.
The trials that wait are dealt out to the workers that are there. All times are in seconds.
"""

import heapq
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ENOUGH = 0.02  # of a trial's length, before its own speed says something
_STARTED = 0.1  # of its length, before a trial that ended early says how long a whole one takes


@dataclass(frozen=True)
class Ended:
    """A trial that has ended."""

    configuration: str
    length: float  # in epochs or steps
    seconds: float  # for which it held a worker, over all attempts
    completed: bool
    share: float | None = None  # of its length that it trained if it ended early, None if unknown
    tail: float | None = None  # seconds from its last step to its end
    start: float = 0.0  # of its last attempt, seconds since 1970, as `end`
    end: float = 0.0


@dataclass(frozen=True)
class Running:
    """A trial that holds a worker."""

    configuration: str
    length: float
    share: float  # of its length that is trained
    seconds: float  # for which it has held a worker, over all attempts
    trained: float = 0.0  # share that this attempt has trained, in `training` seconds
    training: float = 0.0
    since_step: float = 0.0  # seconds since its last step
    judged: bool = True  # it may be stopped early
    start: float = 0.0  # of this attempt, seconds since 1970


@dataclass(frozen=True)
class Waiting:
    """A trial that waits for a worker, or that a search is expected to choose."""

    configuration: str
    length: float
    share: float = 0.0  # trained by an earlier attempt
    judged: bool = True


class Remaining:
    """The time left of each running trial and of the sweep."""

    def __init__(self, ended: Sequence[Ended], running: Sequence[Running]) -> None:
        """Learn from what is known now."""
        self._running = running
        completed = [e for e in ended if e.completed and e.length]
        tails = [e.tail for e in completed if e.tail is not None]
        self._tail = statistics.median(tails) if tails else 0.0
        self._rates = _by_configuration([(e.configuration, e.seconds / e.length) for e in completed])
        early = [e for e in ended if not e.completed and e.length and (e.share or 0.0) >= _STARTED]
        weak = [(e.configuration, e.seconds / (e.length * e.share)) for e in early if e.share]
        own = [(r, rest) for r in running if (rest := self._by_own_speed(r)) is not None and r.length]
        weak += [(r.configuration, (r.seconds + rest) / r.length) for r, rest in own]
        self._weak = {name: rate for name, rate in _by_configuration(weak).items() if name not in self._rates}
        self._lives_on = _survival(self._ends(ended), [r.share for r in running if r.judged], len(completed))
        self._gap = _gap(ended, running)

    def _ends(self, ended: Sequence[Ended]) -> list[float]:
        """Return the shares at which trials ended early."""
        found = []
        for e in ended:
            if not e.completed:
                whole = self.whole(e.configuration, e.length)
                known = e.share if e.share is not None else e.seconds / whole if whole else None
                found += [] if known is None else [min(known, 1.0)]
        return found

    def whole(self, configuration: str, length: float) -> float | None:
        """Return how long a trial takes from its start to its end, or None if nothing is known."""
        rates = self._rates | self._weak
        if not rates:
            return None
        return length * (rates[configuration] if configuration in rates else statistics.fmean(rates.values()))

    def _by_own_speed(self, r: Running) -> float | None:
        """Return the time left of a trial at its own speed, or None before it has one."""
        if r.share >= 1.0:
            return max(self._tail - r.since_step, 0.0)
        if r.trained < _ENOUGH or r.training <= 0:
            return None
        return (1.0 - r.share) * r.training / r.trained + self._tail

    def of(self, r: Running) -> float | None:
        """Return the time left of a running trial if it is not stopped early, or None if unknown."""
        own, whole = self._by_own_speed(r), self.whole(r.configuration, r.length)
        if whole is None or r.share >= 1.0:
            return own
        expected = whole - r.seconds if r.configuration in self._rates else (1.0 - r.share) * whole
        if own is None:
            return max(expected, 0.0)
        weight = r.share if r.configuration in self._rates else 1.0
        return own if expected <= 0 else weight * own + (1.0 - weight) * expected

    def of_sweep(self, waiting: Sequence[Waiting], workers: int, rounds: Sequence[int] = ()) -> float | None:
        """Return the time left of the sweep, or None if unknown.

        `workers` is how many trials may run at once, as far as known. `rounds` are numbers of whole
        trials that follow one round after the other, as the further seeds of a search do.
        """
        free = []
        for r in self._running:
            if (rest := self.of(r)) is None:
                return None
            share_left = max(1.0 - r.share, 1e-9)
            free.append(rest * min(self._lives_on(r.share) / share_left, 1.0) if r.judged else rest)
        if not waiting and not rounds:
            return max(free, default=0.0)
        free += [0.0] * (workers - len(free))
        if not free:
            return None
        heapq.heapify(free)
        last, lengths = max(free), [w.length for w in waiting] or [r.length for r in self._running]
        for w in waiting:
            if (whole := self.whole(w.configuration, w.length)) is None:
                return None
            end = heapq.heappop(free) + self._gap + whole * (self._lives_on(w.share) if w.judged else 1.0 - w.share)
            heapq.heappush(free, end)
            last = max(last, end)
        if rounds:
            whole = self.whole("", statistics.fmean(lengths)) if lengths else None
            if whole is None:
                return None
            last += sum(math.ceil(count / len(free)) * (self._gap + whole) for count in rounds)
        return last


def _by_configuration(rates: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return configuration -> mean rate."""
    found: dict[str, list[float]] = {}
    for configuration, rate in rates:
        found.setdefault(configuration, []).append(rate)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _survival(ends: Sequence[float], running: Sequence[float], completed: int) -> Callable[[float], float]:
    """Return share -> the share that a trial is expected to train further, by Kaplan and Meier's estimate.

    `ends` are the shares at which trials ended early, `running` those that trials have reached.
    """
    steps: list[tuple[float, float]] = []  # share, and what goes on after it, of those that came so far
    for share in sorted(set(ends)):
        at_risk = completed + sum(end >= share for end in ends) + sum(r > share for r in running)
        steps.append((share, 1.0 - ends.count(share) / at_risk))

    def expected(share: float) -> float:
        lives, reached, total = 1.0, share, 0.0
        for end, goes_on in steps:
            if end > share:
                total += lives * (end - reached)
                lives, reached = lives * goes_on, end
        return total + lives * (1.0 - reached)

    return expected


def _gap(ended: Sequence[Ended], running: Sequence[Running]) -> float:
    """Return how long a worker usually takes from the end of a trial to the start of its next."""
    ends = sorted(e.end for e in ended if e.end)
    starts = sorted(start for start in [*(e.start for e in ended), *(r.start for r in running)] if start)
    gaps, free, next_end = [], list[float](), 0
    for start in starts:
        while next_end < len(ends) and ends[next_end] <= start:
            free.append(ends[next_end])
            next_end += 1
        if free:
            gaps.append(start - free.pop())
    return statistics.median(gaps) if gaps else 0.0
