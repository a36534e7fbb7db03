"""The table of docs/reference/site-conditions.md lists just the conditions that are tested, in their order, and keeps its promise."""

from tests.sites_table import HEAD, PAGE, rows, table
from tests.support.conditions_of_sites import CONDITIONS
from tests.support.site_bench import Start, covered, doubled


def test_the_table_lists_the_conditions_that_are_tested() -> None:
    found = rows(PAGE.read_text())
    assert [row[:2] for row in found] == [[c.name, c.happened] for c in CONDITIONS]
    assert len({row[0] for row in found}) == len(found) >= 25
    for row in found:
        completed, lost, twice, idle, _ = map(int, row[2:])
        assert completed > 0
        assert (lost, twice) == (0, 0), row
        assert idle <= 60, row


def test_a_table_is_read_as_it_is_written() -> None:
    entry = {"condition": "a `|` b", "happened": "c", "completed": 3, "lost": 1, "doubled": 2, "idle": 4, "loading": 5}
    text = table([entry])
    assert text.splitlines()[0] == f"| {' | '.join(HEAD)} |"


def test_what_was_done_twice_is_counted() -> None:
    job = Start("1_0", "a", "COMPLETED", 0.0, 9.0)
    epoch = {"trial": "t", "job": "1_0", "epoch": 1, "from": 1.0, "to": 2.0}
    assert doubled([job], [epoch]) == []
    assert doubled([job], [epoch, {**epoch, "job": "1_1"}]) == ["t trained epoch 1 2 times"]
    assert doubled([job, Start("2", "a", "FAILED", 0.0, 1.0)], [epoch]) == ["a is the name of jobs 1 2"]
    begun = {**epoch, "epoch": 0}
    assert doubled([job], [begun, begun, epoch]) == []


def test_time_under_several_spans_is_counted_once() -> None:
    assert covered(0.0, 10.0, [(2.0, 4.0), (3.0, 5.0), (8.0, 12.0), (-3.0, 1.0)]) == 6.0
    assert covered(0.0, 10.0, []) == 0.0
