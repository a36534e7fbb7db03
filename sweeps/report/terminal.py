"""Fit a table to a terminal: numbers are never cut, names are shortened, and columns are left out with a note."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from jobs.cli import printable

_FEWEST = 16  # characters of a line of a name, before a column is left out for it
_PADDING = 3  # blanks and a rule around a column


@dataclass(frozen=True)
class Column:
    """A column of texts. The last columns are left out first."""

    name: str
    cells: Sequence[Text | str]
    words: bool = False  # words, which may be wrapped; else numbers
    most_lines: int | None = 3  # of words, beyond which they are shortened; None for any number
    keep: bool = False  # never left out

    whole_name: bool = False  # its name is in one line

    @property
    def width(self) -> int:
        """Return the characters that its widest cell takes, or its name's longest word."""
        parts = [self.name] if self.whole_name else self.name.split() or [""]
        return max(map(cell_len, [*parts, *map(str, self.cells)]))


def fitted(columns: Sequence[Column], width: int | None, table: Table, whole: str) -> Table:
    """Fill `table` with `columns` in at most `width` characters; None is as wide as they are.

    `whole` says where everything is, in a note below if something was shortened or left out.
    """
    wide = [replace(c, whole_name=True) for c in columns]
    room = _room(wide, width)
    shown = wide if room is None or sum(c.width for c in wide if c.words) <= room else list(columns)
    room = _room(shown, width)
    while room is not None and room < sum(min(c.width, _FEWEST) for c in shown if c.words):
        leaving = next((c for c in reversed(shown) if not c.keep), None)
        if leaving is None:
            break
        shown.remove(leaving)
        room = _room(shown, width)
    shortened, texts = False, []
    for column, widest in zip(shown, _widths(shown, room), strict=True):
        made = [_wrapped(cell, widest, column.most_lines) if column.words else cell for cell in column.cells]
        shortened |= any(str(cell).endswith("…") and not str(old).endswith("…") for cell, old in zip(made, column.cells, strict=True))
        header = "\n".join(textwrap.wrap(column.name, widest, break_on_hyphens=False))
        table.add_column(header, justify="left" if column.words else "right", no_wrap=True)
        texts.append(made)
    for cells in zip(*texts, strict=True):
        table.add_row(*cells)
    lost = [c.name for c in columns if c.name not in {kept.name for kept in shown}]
    said = ["names are shortened"] * shortened + [f"without {', '.join(lost)}, for which the terminal is too narrow"] * bool(lost)
    if said:
        table.caption = "\n".join([f"{'; '.join(said)}: {whole}", *filter(None, [str(table.caption or "")])])
        table.caption_justify = "left"
    return table


def _room(columns: Sequence[Column], width: int | None) -> int | None:
    """Return the characters that the columns of words may take together, None for any number."""
    return None if width is None else width - 1 - _PADDING * len(columns) - sum(c.width for c in columns if not c.words)


def _widths(columns: Sequence[Column], room: int | None) -> list[int]:
    """Return the width of each column; those of words share what room there is, the narrow ones first."""
    found = {id(c): c.width for c in columns}
    words = sorted((c for c in columns if c.words), key=lambda c: c.width)
    for i, column in enumerate(words):
        if room is not None:
            found[id(column)] = max(min(column.width, room // (len(words) - i)), 1)
            room -= found[id(column)]
    return [found[id(c)] for c in columns]


def _wrapped(cell: Text | str, width: int, most_lines: int | None) -> Text | str:
    """Return `cell` in at most so many lines of `width` characters; an ellipsis ends what is shortened."""
    if cell_len(str(cell)) <= width:
        return cell
    made = "\n".join(textwrap.wrap(printable(str(cell)), width, max_lines=most_lines, placeholder="…"))
    return Text(made, style=cell.style) if isinstance(cell, Text) else made
