"""Answer several values for one key, where a command runs one configuration: which command takes them."""

import shlex


def refuse_several(override: str, is_list: bool) -> None:
    """Raise ValueError about `override`, which gives its key several values as --multirun has them: what takes them.

    `is_list` says that the value of the key is a list.
    """
    key, _, value = override.partition("=")
    if is_list:
        raise ValueError(f"{key} must be a list; got {value}: write {shlex.quote(f'{key}=[{value}]')}")
    each = f"python -m jobs.pretrain -m {shlex.quote(override)} runs each"
    compared = "a sweep compares them over seeds: python -m sweeps new NAME writes one"
    raise ValueError(f"{key} must have one value; got {value}: {each}, and {compared}")
