"""The command-line parser that every command of the project shares."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # a value and no option, as argparse sees it

_NOT_ASCII = re.compile("[^ -~]")


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" if a known word X is near `word` in any case, else ""."""
    words = {k.casefold(): k for k in reversed(list(known))}
    near = difflib.get_close_matches(word.casefold(), list(reversed(words)), 1, cutoff)
    return f"; did you mean {words[near[0]]}?" if near else ""


def printable(text: object, keep: str = "") -> str:
    """Return text with its control characters escaped, except those in `keep`.

    Use it for all text that was read from files: a cause, a name, a line of a log.
    """

    def escaped(found: re.Match[str]) -> str:
        c = found[0]
        return c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()

    return _NOT_ASCII.sub(escaped, str(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises mistakes as one-line ValueErrors and takes no abbreviations.

    `keys` returns the keys of `key=value` overrides, for hints. `renamed` maps old options to new,
    with or without a value: {"--engine ray": "--backend allocation"}.
    With `intermixed`, options may stand between positional words.
    """

    def __init__(
        self,
        *args: Any,
        keys: Callable[[], Iterable[str]] | None = None,
        renamed: Mapping[str, str] | None = None,
        intermixed: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        if (name := Path(sys.argv[0]).stem).startswith("cnnjepa-") and str(kwargs.get("prog")).startswith("python -m"):
            kwargs["prog"] = name  # an installed command is called by its own name
        super().__init__(*args, **kwargs)
        self._keys, self._intermixed = keys, intermixed
        self._renamed = dict(renamed or {})

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a ValueError, without its lines of usage."""
        said = " ".join(message.split())
        if wrong := re.fullmatch(r"argument ([^:]+): invalid (\w+) value: '(.*)'", said):
            raise ValueError(f"{wrong[1]} must be of type {wrong[2]}; got {wrong[3]}")
        raise ValueError(f"the command line must match --help; got {said}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the command line; raise ValueError at the first unknown word."""
        words = list(sys.argv[1:] if args is None else args)
        self._refuse_unknown(words)
        if self._intermixed and "--" not in words:  # argparse would lose what it stands for
            return super().parse_intermixed_args(words, namespace)
        return super().parse_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = list(action.choices or ())
        if not choices or value in choices:
            return
        name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest).upper()
        new = self._renamed.get(f"{name} {value}")
        hint = f": write {new}" if new else did_you_mean(str(value), map(str, choices))
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value}{hint}")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Raise ValueError at an unknown option or command, before it is taken for a value."""
        commands = next((a for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        for i, word in enumerate(words):
            if word in ("--", "-h", "--help"):
                return
            if commands is not None and not word.startswith("-"):
                self._check_value(commands, word)
                inner = commands.choices[word]
                if isinstance(inner, Parser):
                    inner._refuse_unknown(words[i + 1 :])
                return
            if word.startswith("-") and word != "-" and " " not in word.partition("=")[0] and not _NEGATIVE_NUMBER.fullmatch(word):
                name, separator, value = word.partition("=")
                if name in self._option_string_actions:
                    continue
                following = words[i + 1] if i + 1 < len(words) else ""
                if not separator and following and not following.startswith("-") and "=" not in following:
                    separator, value = " ", following
                self._refuse_option(name, separator, value)

    def _refuse_option(self, name: str, separator: str, value: str) -> NoReturn:
        got = f"{name}{separator}{value}"
        if not got.isprintable():
            got = repr(got)
        if new := self._renamed.get(name):
            instead = self._renamed.get(f"{name} {value}") or f"{new}{separator}{value}"
            raise ValueError(f"{name} must be written {new}; got {got}: write {instead}")
        what = repr(name) if not name.isprintable() else name
        raise ValueError(f"{what} must be an option listed by --help; got {got}{self._hint(name, value)}")

    def _hint(self, name: str, value: str) -> str:
        options = [o for o in self._option_string_actions if o.startswith("--")]
        if shortened := [o for o in options if len(name) > 2 and o.startswith(name)]:
            return f"; did you mean {' or '.join(shortened)}?"
        if hint := did_you_mean(name, options, 0.75):
            return hint
        key = name.lstrip("-").replace("-", "_")
        keys = list(self._keys()) if self._keys is not None and key else []
        same = [k for k in keys if k == key] or [k for k in keys if k.rpartition(".")[2] == key]
        if near := same[:1] or difflib.get_close_matches(key, keys, 1, 0.75):
            return f"; did you mean {near[0]}={value or 'VALUE'}?"
        return did_you_mean(name, options)
