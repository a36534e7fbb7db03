"""Change what a program must not depend on: its clock, and where random numbers without a seed come from."""

import builtins
import datetime
import functools
import itertools
import os
import random
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

from jobs.resuming.own_files import is_own

SHIFT_SECONDS = 40 * 86_400.0 + 4_321.0
SPEED = 1_000.0  # of the clock of the second undisturbed run
_CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")


def counting(start: float, tick: float) -> Callable[[float], float]:
    """Return a clock that advances by `tick` seconds each time it is read."""
    looks = itertools.count(1)
    return lambda now: start + tick * next(looks)


def hurried() -> Callable[[float], float]:
    """Return a clock that is ahead, and runs a thousand times as fast."""
    began: dict[bool, float] = {}

    def shifted(now: float) -> float:
        first = began.setdefault(now > 1e9, now)  # the time of day, or a time since the start of something
        return first + SHIFT_SECONDS + SPEED * (now - first)

    return shifted


def set_clock(change: Callable[[float], float]) -> None:
    """Let each clock of Python give `change` of its time, in modules that are imported from now on."""
    for name in _CLOCKS:
        real = getattr(time, name)
        setattr(time, name, functools.partial(lambda r: change(r()), real))
        nanoseconds = getattr(time, f"{name}_ns")
        setattr(time, f"{name}_ns", functools.partial(lambda r: int(change(r() / 1e9) * 1e9), nanoseconds))
    now = time.time
    for name in ("localtime", "gmtime", "ctime"):
        setattr(time, name, functools.partial(lambda real, seconds=None: real(now() if seconds is None else seconds), getattr(time, name)))
    strftime, localtime = time.strftime, time.localtime
    time.strftime = lambda format, t=None: strftime(format, localtime() if t is None else t)
    _give_own_modules(_dated(now))


def _dated(now: Callable[[], float]) -> types.ModuleType:
    """Return the module datetime, by the clock `now`."""
    real_datetime, real_date = datetime.datetime, datetime.date

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real_datetime)

    class DateTime(real_datetime, metaclass=Meta):  # type: ignore[misc,valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real_datetime.fromtimestamp(now(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return real_datetime.fromtimestamp(now(), datetime.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return real_datetime.fromtimestamp(now())

    class DateMeta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real_date)

    class Date(real_date, metaclass=DateMeta):  # type: ignore[misc,valid-type]
        @classmethod
        def today(cls) -> Any:
            return real_date.fromtimestamp(now())

    module = types.ModuleType("datetime", datetime.__doc__)
    vars(module).update({**vars(datetime), "datetime": DateTime, "date": Date})
    return module


def _give_own_modules(module: types.ModuleType) -> None:
    """Let the program's own files import `module` for the one of its name, and libraries the real one.

    Compiled libraries such as pandas derive from the classes of datetime, and crash where these are others.
    """
    real = builtins.__import__

    def importing(name: str, globals: Mapping[str, Any] | None = None, *rest: Any, **more: Any) -> Any:
        if name == module.__name__ and globals is not None and is_own(globals.get("__file__") or "<"):
            return module
        return real(name, globals, *rest, **more)

    builtins.__import__ = importing


def set_entropy(seed: int) -> None:
    """Let what the system gives as random bytes depend on `seed`, in modules that are imported from now on."""
    source, seeded = random.Random(seed), random.Random.seed

    def urandom(count: int) -> bytes:
        return source.randbytes(count)

    def seed_it(self: random.Random, a: Any = None, version: int = 2) -> None:
        seeded(self, source.getrandbits(64) if a is None else a, version)

    os.urandom = urandom
    random._urandom = urandom  # type: ignore[attr-defined]
    kind: Any = random.Random
    kind.seed = seed_it
    random.seed = functools.partial(seed_it, random._inst)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.seed = torch.random.seed = lambda: torch.manual_seed(source.getrandbits(62)).initial_seed()


def apply(conditions: Mapping[str, Any]) -> None:
    """Set the conditions of this process; an empty mapping changes nothing. Call it before the program is imported.

    `clock` is "hurried", or the start of a counting clock in seconds; `python`, `numpy` and `torch`
    seed the global generators; `entropy` seeds what the system gives.
    """
    if "entropy" in conditions:
        set_entropy(conditions["entropy"])
    if "python" in conditions:
        random.seed(conditions["python"])
    if "numpy" in conditions:
        import numpy as np

        np.random.seed(conditions["numpy"])
    if "torch" in conditions:
        import torch

        torch.manual_seed(conditions["torch"])
    clock = conditions.get("clock")
    if clock is not None:
        set_clock(hurried() if clock == "hurried" else counting(float(clock), 0.01 + float(clock) * 1e-11))
