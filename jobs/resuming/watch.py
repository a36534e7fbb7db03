"""Watch a training from within its process: what it saves and reports, and what it holds at a given line.

Lines are counted after each save, and after the state is read when a run resumes. So a moment is a
save and a number of lines: there a process is killed, and there states are compared.
"""

import json
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import TIMING_KEYS, RunFolder
from cnnjepa.run.saver import Saver
from jobs.resuming.live import Item, copied, digest, live_items
from jobs.resuming.outcome import flat
from jobs.resuming.own_files import is_own

LINES_AFTER_SAVE, LINES_AFTER_READ = 600, 30_000
START = -1  # the moment of a run that begins, or that has read its state


@dataclass(frozen=True)
class Moment:
    """A line of a run: `line` lines of the program after the save at step `save`, or after START."""

    save: int
    line: int


@dataclass
class Plan:
    """What to do with a run: where to kill or stop it, and where to look at it."""

    kill: Moment | None = None
    stop: Moment | None = None
    look: Moment | None = None
    lines: int = 1  # how many lines in a row to look at
    values: str = ""  # file for what was seen at `look`
    repair: str = ""  # file with the items to set at `look`
    only: tuple[str, ...] = ()  # names of the items to set


@dataclass
class Watch:
    """The watch of this process; `install` begins it."""

    plan: Plan
    out: IO[str]
    moment: int = START
    count: int = 0
    limit: int = 0
    lines: list[tuple[str, int]] = field(default_factory=list)
    stopped: bool = False
    saves: int = 0
    seen: dict[str, Any] = field(default_factory=dict)
    inside: bool = False
    looks: list[dict[str, Any]] = field(default_factory=list)

    def say(self, **event: Any) -> None:
        """Write an event, so that a kill cannot lose it."""
        self.out.write(json.dumps(event) + "\n")
        self.out.flush()

    def begin(self, moment: int, limit: int) -> None:
        """Count lines from here on."""
        self.end_lines()
        self.moment, self.count, self.limit = moment, 0, limit
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            if is_own(frame.f_code.co_filename):
                frame.f_trace = self._line
            frame = frame.f_back
        sys.settrace(self._call)

    def end_lines(self) -> None:
        """Stop counting, and write down the lines that were run."""
        sys.settrace(None)
        if self.lines:
            self.say(lines=self.lines, after=self.moment)
        if self.looks:
            self._write_looks()
        self.lines = []

    def leave(self) -> None:
        """Watch no more: this is another process of the program, such as one that loads data."""
        sys.settrace(None)
        self.limit, self.lines, self.looks, self.plan = 0, [], [], Plan()
        self.out = open(os.devnull, "w")  # noqa: SIM115, the process keeps it

    def _call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        return self._line if is_own(frame.f_code.co_filename) else None

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event != "line" or not self.limit:
            return self._line
        here = Moment(self.moment, self.count)
        self.count += 1
        self.lines.append((f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}", frame.f_lineno))
        plan = self.plan
        if here == plan.kill:
            self.end_lines()
            os.kill(os.getpid(), signal.SIGKILL)
        if here == plan.stop:
            self.stopped = True
        look = plan.look
        if look is not None and look.save == here.save and look.line <= here.line < look.line + plan.lines:
            self._look(frame, first=here == look)
        if self.count >= self.limit:
            self.end_lines()
            self.limit = 0
            return None
        return self._line

    def _frames(self, frame: types.FrameType | None) -> Iterable[types.FrameType]:
        while frame is not None:
            if is_own(frame.f_code.co_filename):
                yield frame
            frame = frame.f_back

    def _look(self, frame: types.FrameType, first: bool) -> None:
        traced, self.limit = self.limit, 0  # looking runs no lines of the program, but may run its properties
        items = live_items(self._frames(frame), is_own, skip=[self, self.plan])
        if first and self.plan.repair:
            wanted = pickle.loads(Path(self.plan.repair).read_bytes())  # noqa: S301, written by the drill itself
            for name in self.plan.only:
                if name in wanted and name in items and (put := items[name].put) is not None:
                    put(copied(wanted[name].value))
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        kept = {name: Item(i.name, i.kind, i.value if first else None, None, i.root, i.digest, i.computed) for name, i in items.items()}
        self.looks.append({"where": where, "items": kept})
        self.limit = traced

    def _write_looks(self) -> None:
        if self.plan.values:
            Path(self.plan.values).write_bytes(pickle.dumps(self.looks))
        self.looks = []

    def _where(self) -> str:
        """Return the program's line that is running."""
        frame: types.FrameType | None = sys._getframe(1)
        found = next(iter(self._frames(frame)), None)
        return "" if found is None else f"{found.f_code.co_filename}:{found.f_lineno}"

    def saved(self, step: int, state: Any) -> None:
        """Note a save, and count lines from it on."""
        self.saves += 1
        known = flat(state)
        plain = (int, float, str, bool, type(None))
        self.say(save=step, where=self._where(), state={k: v if isinstance(v, plain) else digest(v) for k, v in known.items()})
        self.begin(step, LINES_AFTER_SAVE)

    def reported(self, step: int, values: dict[str, Any]) -> None:
        """Note what was reported."""
        self.say(report=step, metrics=values)


def install(plan: Plan, out: IO[str]) -> Watch:
    """Watch the run of this process from now on."""
    watch = Watch(plan, out)
    save, read, record = checkpoint.save, checkpoint.read, RunFolder.record
    begin, finish = Saver.begin, Saver.finish

    def on_save(folder: Path, step: int, state: dict[str, Any], *rest: Any, **more: Any) -> Any:
        done = save(folder, step, state, *rest, **more)
        if not watch.inside and threading.current_thread() is threading.main_thread():
            watch.saved(step, state)
        return done

    def on_read(*all_of: Any, **more: Any) -> Any:
        state = read(*all_of, **more)
        if not watch.saves:  # a task may read its own saves back
            watch.say(read=True, where=watch._where())
            watch.begin(START, LINES_AFTER_READ)
        return state

    def on_record(self: RunFolder, kind: str, step: int, values: dict[str, Any]) -> Any:
        watch.reported(step, {k: v for k, v in values.items() if k not in TIMING_KEYS})
        return record(self, kind, step, values)

    def in_background(self: Saver, step: int, state: dict[str, Any], *rest: Any, **more: Any) -> Any:
        watch.inside = True
        try:
            done = begin(self, step, state, *rest, **more)
        finally:
            watch.inside = False
        self.settle()  # a save that is still being written would be another run's
        watch.saved(step, state)
        return done

    def at_the_end(self: Saver, step: int, state: dict[str, Any], *rest: Any, **more: Any) -> Any:
        watch.inside = True
        try:
            done = finish(self, step, state, *rest, **more)
        finally:
            watch.inside = False
        watch.saved(step, state)
        return done

    os.register_at_fork(after_in_child=watch.leave)
    checkpoint.save, checkpoint.read, RunFolder.record = on_save, on_read, on_record  # type: ignore[method-assign]
    Saver.begin, Saver.finish = in_background, at_the_end  # type: ignore[method-assign]
    return watch
