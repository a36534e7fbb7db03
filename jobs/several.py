"""Answer several values for one key, where a command runs one configuration: which command takes them."""

import shlex

from hydra.core.override_parser.types import Override, ValueType

_SEVERAL = (ValueType.SIMPLE_CHOICE_SWEEP, ValueType.CHOICE_SWEEP, ValueType.RANGE_SWEEP)  # that --multirun can run


def refuse_several(override: str, read: Override | None, is_list: bool) -> None:
    """Raise ValueError, with the ways to run several values, if `override` gives its key more than one as --multirun has them.

    `read` is what Hydra reads of it.
    """
    if read is None or read.value_type not in _SEVERAL:
        return
    key, _, value = override.partition("=")
    if is_list:
        raise ValueError(f"{key} must be a list; got {value}: write {shlex.quote(f'{key}=[{value}]')}")
    each = f"python -m jobs.pretrain -m {shlex.quote(override)} runs each"
    compared = "a sweep compares them over seeds: python -m sweeps new NAME writes one"
    raise ValueError(f"{key} must have one value; got {value}: {each}, and {compared}")
