"""Which part of a long table or campaign `make test` runs."""

from dataclasses import dataclass, field

import pytest

from tests.support import sample


@dataclass
class Item:
    """Stands in for a test that pytest has found."""

    nodeid: str
    marks: list[pytest.Mark] = field(default_factory=list)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.mark)


def found(*numbers: int, nightly: bool = False) -> list[Item]:
    marks = [pytest.mark.campaign("faults").mark, *[pytest.mark.nightly.mark] * nightly]
    return [Item(f"test_{number}", list(marks)) for number in numbers]


def kept(items: list[Item]) -> set[str]:
    return {item.nodeid for item in items if not item.get_closest_marker("nightly")}


def test_as_many_of_a_campaign_as_are_stated_are_kept_in_whatever_order_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "CAMPAIGNS", {"faults": 2})
    there, back = found(*range(9)), found(*reversed(range(9)))
    for items in (there, back):
        sample.leave_the_rest_to_nightly([Item("test_alone"), *items])  # type: ignore[list-item]
    assert len(kept(there)) == 2
    assert kept(there) == kept(back)


def test_what_is_nightly_anyway_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "CAMPAIGNS", {"faults": 2})
    items = [*found(1, 2), *found(3, 4, 5, nightly=True)]
    sample.leave_the_rest_to_nightly(items)  # type: ignore[arg-type]
    assert kept(items) == {"test_1", "test_2"}


def test_a_campaign_without_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "CAMPAIGNS", {})
    with pytest.raises(KeyError, match="faults"):
        sample.leave_the_rest_to_nightly(found(1))  # type: ignore[arg-type]
