"""Which part of the long tests `make test` runs."""

from dataclasses import dataclass, field

import pytest

from tests.support import sample
from tests.support.sample import Long


@dataclass
class Item:
    """Stands in for a test that pytest has found."""

    nodeid: str
    marks: list[str] = field(default_factory=list)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


LISTED = [Long(10, (f"a/t.py::test_{i}",)) for i in range(6)] + [
    Long(25, ("b/t.py::test_x", "b/t.py::test_y")),
    Long(30, ("b/t.py::test_z",)),
]


def stay(items: list[Item], budget: float, monkeypatch: pytest.MonkeyPatch, seed: str = "1") -> set[str]:
    monkeypatch.setattr(sample, "BUDGET", budget)
    monkeypatch.setattr(sample, "SEED", seed)
    sample.leave_the_rest_to_nightly(items, LISTED, whole_files=True)  # type: ignore[arg-type]
    assert all(("slow" in item.marks) == (item.nodeid != "c.py::test_short") for item in items), "make fast leaves them all out"
    return {item.nodeid for item in items if "nightly" not in item.marks}


def found(file: str = "") -> list[Item]:
    return [Item(test) for entry in LISTED for test in entry.tests if test.startswith(file)] + [Item("c.py::test_short")]


def test_one_of_each_folder_stays_and_as_many_more_as_fit() -> None:
    for seed in map(str, range(20)):
        taken = sample.kept(LISTED, 60, seed)
        assert {entry.folder for entry in taken} == {"a", "b"}
        assert sum(entry.seconds for entry in taken) <= 60
        left = [entry.seconds for entry in LISTED if entry not in taken]
        assert all(seconds > 60 - sum(entry.seconds for entry in taken) for seconds in left), "nothing that fits is left out"
    assert len({tuple(e.tests for e in sample.kept(LISTED, 60, str(seed))) for seed in range(20)}) > 5, "other seeds draw others"
    assert len(sample.kept(LISTED, 0)) == 2
    assert sample.kept(LISTED, 1000, "1") == sample.kept(LISTED, 1000, "1")


def test_what_is_not_drawn_is_nightly_in_whatever_order_and_company_it_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stay(found(), 60, monkeypatch)
    assert "c.py::test_short" in whole
    assert len(whole) < len(found())
    assert stay(found()[::-1], 60, monkeypatch) == whole
    assert stay(found("a/"), 60, monkeypatch) == {test for test in whole if not test.startswith("b/")}
    assert ("b/t.py::test_x" in whole) == ("b/t.py::test_y" in whole), "what shares a fixture stays together"


def test_the_seed_in_a_name_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "BUDGET", 0)
    monkeypatch.setattr(sample, "SEED", "7")
    listed = [Long(9, ("a/t.py::test_1[CNNJEPA_SAMPLE_SEED]",)), Long(9, ("a/t.py::test_2[CNNJEPA_SAMPLE_SEED]",))]
    items = [Item("a/t.py::test_1[CNNJEPA_SAMPLE_SEED=7]"), Item("a/t.py::test_2[CNNJEPA_SAMPLE_SEED=7]")]
    sample.leave_the_rest_to_nightly(items, listed, whole_files=True)  # type: ignore[arg-type]
    assert sorted("nightly" in item.marks for item in items) == [False, True]


def test_a_listed_test_that_does_not_exist_is_refused_by_name_where_its_file_was_collected() -> None:
    lacking = [item for item in found() if item.nodeid != "b/t.py::test_y"]
    with pytest.raises(pytest.UsageError, match=r"tests that do not exist: b/t.py::test_y$"):
        sample.leave_the_rest_to_nightly(lacking, LISTED, whole_files=True)  # type: ignore[arg-type]
    sample.leave_the_rest_to_nightly(lacking, LISTED)  # type: ignore[arg-type]


def test_long_ones_come_first_and_keep_their_order() -> None:
    names = ["c.py::test_short", "a/t.py::test_4", "c.py::test_other", "a/t.py::test_1"]
    items = [Item(name) for name in names]
    sample.long_ones_first(items, LISTED)  # type: ignore[arg-type]
    assert [item.nodeid for item in items] == [names[1], names[3], names[0], names[2]]


def test_the_list_can_be_read() -> None:
    listed = sample.long_tests()
    assert all(entry.seconds > 0 and entry.tests for entry in listed)
    tests = [test for entry in listed for test in entry.tests]
    assert len(tests) == len(set(tests))
    assert all((sample.LONG.parent.parent / entry.file).is_file() for entry in listed)
