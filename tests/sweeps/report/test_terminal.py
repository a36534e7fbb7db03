"""Tables in a terminal: numbers are whole at any width, names give way, then columns."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sweeps.report.terminal import Column, _wrapped, fitted

LONG = "#12 lr 0.003128, momentum_start 0.9574, multi_block, blocks 6, depthwise, depth 2, kernel 3"
NUMBERS = ["69.7 ± 0.4 (3)", "68,712", "0.0337"]


def shown(width: int) -> str:
    columns = [Column("configuration", [LONG, "short"], words=True, keep=True)]
    columns += [Column(f"metric {i}", [Text(number), Text("-")], keep=i == 0) for i, number in enumerate(NUMBERS)]
    out = io.StringIO()
    console = Console(file=out, width=width)
    console.print(fitted(columns, width, Table(caption="a note"), "summary.csv has all"))
    return out.getvalue()


@pytest.mark.parametrize("width", [30, 36, 45, 52, 60, 80, 100, 150])
def test_no_number_is_cut_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    kept = [n for n in NUMBERS if n in text]
    assert NUMBERS[0] in kept
    assert "a note" in text
    said = " ".join(text.split())
    for i, number in enumerate(NUMBERS):
        assert (number in text) != bool(re.search(rf"without .*metric {i}", said)), number


def test_names_are_shortened_first_and_columns_are_left_out_from_the_last() -> None:
    assert LONG in shown(150)
    assert "summary.csv" not in shown(150)
    narrow = " ".join(shown(60).split())
    assert "…" in narrow
    assert "names are shortened: summary.csv has all" in narrow
    assert "without" not in narrow
    assert "without metric 2, for which the terminal is too narrow" in " ".join(shown(52).split())


def test_words_that_must_be_read_whole_are_wrapped() -> None:
    out = io.StringIO()
    cause = "failed: OSError: " + " ".join(f"word{i}" for i in range(40))
    table = fitted([Column("state", [cause], words=True, most_lines=None, keep=True)], 40, Table(), "")
    Console(file=out, width=40).print(table)
    assert all(f"word{i}" in out.getvalue() for i in range(40))


WIDE = ["学习率 0.003和编码器很深的那一个配置和批量大小三十二和没有数据增强的基线配置和更多的文字", "🚀 rocket 🌕🌖🌗🌘 moons", "ascii"]


@pytest.mark.parametrize("width", [24, 31, 40, 64, 120])
def test_characters_of_two_cells_leave_columns_in_their_places(width: int) -> None:
    columns = [Column("配置 configuration", WIDE, words=True, keep=True), Column("score", ["69.7", "1,234", "-"], keep=True)]
    out = io.StringIO()
    Console(file=out, width=width).print(fitted(columns, width, Table(), "summary.csv has all"))
    rows = [line for line in out.getvalue().splitlines() if line[:1] in "┏┃┡│└"]
    assert len({cell_len(row) for row in rows}) == 1
    assert cell_len(rows[0]) <= width
    places = [cell_len(row[: row.rindex("│")]) for row in rows if "│" in row]
    assert len(set(places)) == 1
    text = "".join(row.split("│")[1] for row in rows if row.startswith("│"))
    assert "".join(text.split()).startswith(WIDE[0][:3])
    assert all(number in out.getvalue() for number in ("69.7", "1,234"))


def test_a_word_that_is_left_out_takes_its_number_with_it() -> None:
    """`0.00…` would read as another number."""
    name = "lr 0.003128, momentum_start 0.9574, weight_decay 0.051234"
    assert str(_wrapped(name, 24, 2)) == "lr 0.003128,\nmomentum_start 0.9574,…"
    assert str(_wrapped(f"学习率{'很' * 20}", 9, 1)) == "学习率很…"
