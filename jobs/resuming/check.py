"""The drill of a user's program: kill it at drawn moments, resume it, compare, and name what it forgot."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.resuming import causes as put_back
from jobs.resuming import unsteady
from jobs.resuming.align import aligned
from jobs.resuming.causes import Cause, Group
from jobs.resuming.kinds import Kind
from jobs.resuming.live import Item
from jobs.resuming.outcome import Difference, Outcome, differences, measured_times
from jobs.resuming.runs import Done, ProgramError, Runs, joined
from jobs.resuming.unsteady import Unsteady
from jobs.resuming.watch import START, Moment, Plan

FOLLOWED_LINES = 40
Say = Callable[[str], None]


@dataclass
class Disturbed:
    """A run that was killed or stopped, and resumed."""

    moment: Moment
    stopped: bool  # asked to stop, and not killed
    different: list[Difference] = field(default_factory=list)
    failed: str = ""  # why the resumed run did not end
    outlived_seconds: float = 0.0  # the grace after which a command that was asked to stop had to be killed


@dataclass
class Findings:
    """What a drill of a program has found."""

    saves: int = 0
    reports: int = 0
    disturbed: list[Disturbed] = field(default_factory=list)
    unsteady: list[Unsteady] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    times: list[str] = field(default_factory=list)  # values that measure time, which are not compared
    where: str = ""  # line of the program up to which it has restored what it saved
    restored_at: str = ""
    saved_at: str = ""
    resumed_only: bool = False  # whether `unsteady` is of the resumed run alone
    runs: int = 0

    @property
    def holds(self) -> bool:
        """Return whether each disturbed run equals the undisturbed one."""
        return bool(self.disturbed) and not self.unsteady and not any(d.different or d.failed for d in self.disturbed)


def check(runs: Runs, kills: int, seed: int, leave_out: frozenset[str], say: Say) -> Findings:
    """Run a program undisturbed, then disturb it `kills` times; return what was found.

    Raise ProgramError if the undisturbed run fails, or saves nothing from which it could resume.
    """
    found, draw = Findings(), random.Random(seed)
    reference = undisturbed(runs, "undisturbed")
    found.saves, found.reports, found.saved_at = len(reference.outcome.states), len(reference.outcome.metrics), reference.outcome.saved_at
    say(f"undisturbed: {found.reports} reports, {found.saves} saves")
    again = undisturbed(runs, "again", 1, {"clock": "hurried"})
    times = measured_times(reference.outcome, again.outcome)
    found.times, leave_out = sorted(times - leave_out), leave_out | times
    wrong = differences(again.outcome, reference.outcome, leave_out)
    if wrong:
        say(f"undisturbed, with another clock: {wrong[0].text}")
        found.unsteady = unsteady.causes(lambda h, c: undisturbed(runs, "fixed", h, c).outcome, leave_out, wrong[0])
    else:
        say("undisturbed, with another clock: the same")
        for number in range(kills):
            _disturb(runs, reference, found, draw, leave_out, number % 2 == 1, say)
    found.runs = runs.count
    return found


def undisturbed(runs: Runs, name: str, hashing: int = 0, conditions: Mapping[str, Any] | None = None) -> Done:
    """Run a program to its end; raise ProgramError if it fails."""
    done = runs(name, hashing=hashing, conditions=conditions)
    if done.status or done.outcome.ended != "completed":
        cause = done.outcome.ended or " ".join(done.output.strip().splitlines()[-1:])
        raise ProgramError(f"an undisturbed run must complete; got {cause}, see {done.folder}")
    if len(done.outcome.states) < 2:
        count = len(done.outcome.states)
        raise ProgramError(f"a program must save its state at least twice to be killed between; got {count}: let it save more often")
    return done


def _disturb(runs: Runs, reference: Done, found: Findings, draw: random.Random, leave_out: frozenset[str], stop: bool, say: Say) -> None:
    saves = sorted(reference.outcome.states)
    at = draw.choice(saves[:-1])
    moment = Moment(at, draw.randrange(max(len(reference.outcome.lines.get(at, [])), 1)))
    first = runs("stopped" if stop else "killed", Plan(stop=moment) if stop else Plan(kill=moment))
    disturbed = Disturbed(moment, stop)
    found.disturbed.append(disturbed)
    how = f"{'asked to stop' if stop else 'killed'} {moment.line} lines after save {moment.save}"
    if not stop and not first.killed:
        raise ProgramError(f"a run must come to the same line each time; got none {moment.line} lines after save {moment.save}")
    resumed = runs("resumed", after=first)
    if resumed.status or resumed.outcome.ended != "completed":
        disturbed.failed = resumed.outcome.ended or " ".join(resumed.output.strip().splitlines()[-1:]) or "no result"
        say(f"{how}: the resumed run fails: {disturbed.failed}")
        return
    outcome = joined(first, resumed)
    disturbed.different = differences(outcome, reference.outcome, leave_out)
    say(f"{how}: {disturbed.different[0].text if disturbed.different else 'the same'}")
    if disturbed.different and not (found.causes or found.unsteady):
        _explain(runs, reference, first, resumed, found, leave_out, say)


def _explain(runs: Runs, reference: Done, first: Done, resumed: Done, found: Findings, leave_out: frozenset[str], say: Say) -> None:
    outcome = joined(first, resumed)

    def under(hashing: int, conditions: Mapping[str, Any]) -> Outcome:
        return joined(first, runs("resumed-fixed", after=first, hashing=hashing, conditions=conditions))

    found.restored_at = resumed.outcome.restored_at
    if wrong := differences(under(1, {"clock": "hurried"}), outcome, leave_out):
        found.resumed_only = True
        found.unsteady = unsteady.causes(under, leave_out, wrong[0])
        return
    save = max((s for s in first.outcome.states), default=START)
    match = aligned(reference.outcome.lines.get(save, []), resumed.outcome.lines.get(START, []))
    if match is None:
        found.causes = [Cause(Kind.unknown, "", "", False)]
        return
    there, here = Moment(save, match[0]), Moment(START, match[1])
    seen = runs("look-undisturbed", Plan(look=there)).looks[0]
    looked = runs("look-resumed", Plan(look=here), after=first).looks[0]
    before, after = seen["items"], looked["items"]
    found.where = looked["where"]
    kept = first.folder / "before.pkl"
    put_back.write(before, kept)
    # What follows the clock is no state of the training, and must not be put back.
    other = runs("look-again", Plan(look=there), conditions={"clock": "hurried"}).looks[0]["items"]
    times = {item.name for item in put_back.differing(before, other)}
    groups = put_back.grouped(item for item in put_back.differing(before, after) if item.name not in times)
    say(f"{len(groups)} variables differ at {found.where}: putting them back, to see which of them matter")

    def repaired(chosen: list[Group], lines: int = 1) -> Done:
        names = tuple(name for group in chosen for name in group.names)
        return runs("repaired", Plan(look=here, lines=lines, repair=str(kept), only=names), after=first)

    def equal(chosen: list[Group]) -> bool:
        return not differences(joined(first, repaired(chosen)), reference.outcome, leave_out)

    def followed(chosen: list[Group]) -> list[Item]:
        """Return what differs in the lines that follow, the first first, with `chosen` put back."""
        theirs = runs("follow-undisturbed", Plan(look=there, lines=FOLLOWED_LINES)).looks
        again = runs("follow-again", Plan(look=there, lines=FOLLOWED_LINES), conditions={"clock": "hurried"}).looks
        late = {item.name for a, b in zip(theirs, again) for item in put_back.differing(a["items"], b["items"])}
        for look in theirs:
            look["items"] = {name: item for name, item in look["items"].items() if name not in late}
        return put_back.effects(theirs, repaired(chosen, FOLLOWED_LINES).looks)

    def is_earlier(item: Item) -> bool:
        """Return whether the undisturbed run had the same data at its start."""
        looks = runs("start", Plan(look=Moment(min(reference.outcome.states), 0), lines=4 * FOLLOWED_LINES)).looks
        return any(item.digest == i.digest for look in looks for i in look["items"].values() if i.kind is Kind.array)

    saved = {value for value in reference.outcome.states.get(save, {}).values() if isinstance(value, str)}

    def is_saved(item: Item) -> bool:
        return item.name in before and before[item.name].digest in saved

    chosen = put_back.smallest(groups, equal)
    if chosen is None:
        items = followed(groups)
        kind = put_back.of_effects(items, is_earlier, is_saved) if items else Kind.unknown
        if kind is Kind.value:  # of a number that follows from no variable, such as a place in a loop, a schedule follows first
            kind = Kind.scheduler
        found.causes = [Cause(kind, items[0].name if items else "", "", False)]
        return
    found.causes = []
    for group in chosen:
        kind = put_back.named(group.kind, group.names, before, after)
        if kind is Kind.value:
            kind = put_back.of_effects(followed([g for g in chosen if g is not group]), is_earlier, is_saved)
        found.causes.append(Cause(kind, put_back.common(group.names), put_back.size(group.names, before, after), True))
    found.causes = put_back.folded(found.causes)
