"""Name a trial, such as 03-depth2-seed43: one name for tables, logs, TensorBoard and command lines."""

import re
import unicodedata

_MOST = 48  # characters of a name that tell of the configuration
_OF_SEARCH = re.compile(r"#\d+ ")  # how the label of a search's configuration begins
_BEFORE_VALUE = re.compile(r"(?<=[A-Za-z_])[ =]+(?=[0-9.])")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+]+")
_NAME = re.compile(r"(\d{2,})(-.*)?-seed(-?\d+)")


def trial_name(number: int, label: str, seed: int) -> str:
    """Return the name of trial `number`, safe as a name of files, in a shell and for TensorBoard.

    The number alone tells it from the others: only the first 48 characters of the words are in it.
    """
    return "-".join(filter(None, [f"{number:02d}", slug(label), f"seed{seed}"]))


def slug(label: str) -> str:
    """Return 'lr0.003-multi_block-depth3' for 'lr 0.003, multi_block, depth 3', in ASCII.

    Letters lose their accents, and letters of other scripts are left out; so it may be "". Values
    that do not fit are left out whole.
    """
    plain = unicodedata.normalize("NFKD", _OF_SEARCH.sub("", label, count=1)).encode("ascii", "ignore").decode()
    parts = [_UNSAFE.sub("-", _BEFORE_VALUE.sub("", part)).strip("-.") for part in re.split("[,:] ", plain)]
    made = ""
    for part in filter(None, parts):
        joined = f"{made}-{part}" if made else part[:_MOST].strip("-.")
        if len(joined) > _MOST:
            break
        made = joined
    return made


def number_and_seed(name: str) -> tuple[int, int] | None:
    """Return the number and the seed in the name of a trial, whatever its other words; None if it is no such name."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), int(found[3])) if found else None
