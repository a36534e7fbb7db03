"""Fit a table to a terminal: numbers are never cut, names are shortened, and columns are left out with a note.

Widths are in cells of the terminal: a Chinese character or an emoji takes two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, chop_cells
from rich.table import Table
from rich.text import Text

from jobs.cli import printable

_FEWEST = 16  # cells of a line of a name, before a column is left out for it
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
        """Return what its widest text takes, or its name's longest word."""
        parts = [self.name] if self.whole_name else self.name.split() or [""]
        return max(map(cell_len, [*parts, *map(str, self.cells)]))


def fitted(columns: Sequence[Column], width: int | None, table: Table, whole: str) -> Table:
    """Fill `table` with `columns` in at most `width` cells of a terminal; None is as wide as they are.

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
        header = "\n".join(_lines(column.name, widest))
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


def needs(columns: Sequence[Column]) -> int:
    """Return the cells that a table of `columns` takes if nothing is shortened."""
    return 1 + sum(c.width + _PADDING for c in columns)


def _room(columns: Sequence[Column], width: int | None) -> int | None:
    """Return the cells that the columns of words may take together, None for any number."""
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
    """Return `cell` in at most so many lines of `width`; an ellipsis ends what is shortened, after a whole word if there is room."""
    if cell_len(str(cell)) <= width:
        return cell
    lines = _lines(printable(str(cell)), width)
    if most_lines is not None and len(lines) > most_lines:
        last = lines[most_lines - 1]
        while cell_len(last) >= width:
            last = last.rpartition(" ")[0] if " " in last else last[:-1]
        lines = [*lines[: most_lines - 1], f"{last}…"]
    made = "\n".join(lines)
    return Text(made, style=cell.style) if isinstance(cell, Text) else made


def _lines(text: str, width: int) -> list[str]:
    """Return the words of `text` in lines of at most `width`, and break those that are wider than a line."""
    lines: list[str] = []
    for word in text.split():
        if lines and cell_len(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines += filter(None, chop_cells(word, width))
    return lines
