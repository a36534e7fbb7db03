"""What a sweep's file or a notebook needs: `from sweeps import Configuration, PlainTask, Scale, Sweep, SweepSpec, main, run`."""

import importlib
from typing import TYPE_CHECKING, Any

from cnnjepa.run.console import require_own

if TYPE_CHECKING:
    from jobs.plain import PlainTask as PlainTask
    from jobs.plain_run import Run as Run
    from sweeps.cli.api import Sweep as Sweep
    from sweeps.cli.api import plan as plan
    from sweeps.cli.api import run as run
    from sweeps.cli.run import main as main
    from sweeps.spec.space import choice as choice
    from sweeps.spec.space import real as real
    from sweeps.spec.space import whole as whole
    from sweeps.spec.sweep import Configuration as Configuration
    from sweeps.spec.sweep import Scale as Scale
    from sweeps.spec.sweep import SweepSpec as SweepSpec

_PLACES = {
    "jobs.plain": ("PlainTask",),
    "jobs.plain_run": ("Run",),
    "sweeps.cli.api": ("Sweep", "plan", "run"),
    "sweeps.cli.run": ("main",),
    "sweeps.spec.space": ("choice", "real", "whole"),
    "sweeps.spec.sweep": ("Configuration", "Scale", "SweepSpec"),
}
_MODULE = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULE)

require_own()


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that a command that needs none of it starts at once."""
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
