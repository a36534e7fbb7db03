"""Names of configurations: different values look different."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.task import task_named
from sweeps.spec.labels import label, labels, number

TASK = task_named("cnnjepa.task")
MOMENTUM, LR = "method.ema.momentum_start", "optimizer.lr"
values = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.sampled_from(["dense", "1", "1e-3", ""])
)
configurations = st.lists(st.dictionaries(st.sampled_from([MOMENTUM, LR, "a.depth", "b.depth", "depth"]), values), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([{MOMENTUM: 0.9999}, {MOMENTUM: 0.99995}, {MOMENTUM: 0.99999}], ["0.9999", "0.99995", "0.99999"]),
        ([{MOMENTUM: 0.999}, {MOMENTUM: 0.99999}], ["0.999", "0.99999"]),
        ([{MOMENTUM: 0.1 + 0.2}, {MOMENTUM: 0.3}], ["0.30000000000000004", "0.3"]),
        ([{MOMENTUM: 0.0021544346900318843}, {MOMENTUM: 0.01}], ["0.002154", "0.01"]),
        ([{MOMENTUM: 0.0021544346900318843}, {MOMENTUM: 0.0021544399}], ["0.00215443", "0.00215444"]),
    ],
)
def test_a_number_has_the_digits_that_tell_it_from_the_others(given: list[dict], shown: list[str]) -> None:
    assert labels(given, TASK) == [f"momentum_start {text}" for text in shown]
    assert [label(one, TASK, given) for one in given] == labels(given, TASK)


def test_a_number_is_not_written_as_one_that_it_is_not() -> None:
    assert number(0.99999) == "0.99999"
    assert number(0.9999912345678) != "1"
    assert number(0.0031283746123) == "0.003128"
    assert number(1234567.0) == "1234567"


def test_keys_that_end_alike_are_told_apart_and_words_alone_where_they_say_enough() -> None:
    assert labels([{"a.depth": 1}, {"b.depth": 1}], TASK) == ["a.depth 1", "b.depth 1"]
    assert labels([{"x": "dense"}, {"y": "dense"}], TASK) == ["x dense", "y dense"]
    assert labels([{LR: "1e-3"}, {LR: "1e-2"}], TASK) == ["lr 1e-3", "lr 1e-2"]
    assert labels([{"x": 1}, {"x": "1"}], TASK) == ["x 1", "x '1'"]
    assert labels([{}, {"x": "dense"}], TASK) == ["unchanged", "dense"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations)
def test_different_configurations_have_different_names(drawn: list[dict]) -> None:
    different = list({repr(one): one for one in drawn}.values())
    assert len(set(labels(different, TASK))) == len(different)
