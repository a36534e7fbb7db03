"""Check a sweep's file before anything is planned: its name, its configurations and its numbers."""

import re
from typing import Any

from cnnjepa.run.command_line import did_you_mean
from sweeps.spec.check import MOST, check_free, check_value
from sweeps.spec.parts import check_parts
from sweeps.spec.sweep import Scale, SweepSpec

_NAME_BYTES = 100  # of a sweep's name, since file names have at most 255 and jobs are named by it too


def count(value: Any, what: str) -> int:
    """Return `value`; raise ValueError, which names `what`, unless it is a whole number from 1 to MOST."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be a whole number, at least 1; got {value!r}, a {type(value).__name__}")
    if not 1 <= value <= MOST:
        raise ValueError(f"{what} must be at least 1{f' and at most {MOST}' if value > MOST else ''}; got {value}")
    return value


def check_spec(spec: SweepSpec, scale: Scale, scale_name: str) -> None:
    """Raise ValueError if the sweep's file makes no sense at this scale; what its keys mean is not checked."""
    check_parts(spec)
    if not re.fullmatch(r"\w[\w.-]*", spec.name):
        raise ValueError(f"a sweep's name must be letters, digits, _, . and -, since it names a folder and jobs; got {spec.name!r}")
    if (length := len(spec.name.encode())) > _NAME_BYTES:
        rule = f"a sweep's name must have at most {_NAME_BYTES} bytes, since it names a folder and jobs"
        raise ValueError(f"{rule}; got {length}: shorten it")
    configurations = spec.configurations_at(scale)
    if spec.space and configurations:
        raise ValueError(f"{spec.name} must have configurations or a space; got both: remove one of them")
    if not spec.space and not configurations:
        raise ValueError(f"{spec.name} must have configurations or a space; got neither: give configurations=[...] or space=[...]")
    keys = [d.key for d in spec.space]
    for dimension in scale.space:
        if dimension.key not in keys:
            rule = f"the space of the {scale_name} scale must replace dimensions of the sweep's space"
            raise ValueError(f"{rule}; got {dimension.key}, which is none of them{did_you_mean(dimension.key, keys)}")
    count(scale.seeds, f"seeds of the {scale_name} scale")
    for configuration in configurations:
        for key, value in configuration.overrides.items():
            check_free(key, "a configuration must not set")
            check_value(key, value)
