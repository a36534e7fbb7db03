"""What is said while a run goes, on a clock that the test sets."""

from types import SimpleNamespace

import pytest

from cnnjepa.monitoring import progress
from cnnjepa.monitoring.progress import TrainingProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: found.now))
    return found


def test_the_pace_is_that_since_the_last_look(clock: SimpleNamespace) -> None:
    shown = TrainingProgress(total_steps=50, start_step=10, images_per_step=32, shown=True)
    clock.now += 4
    assert shown.images_per_second(20) == 80
    clock.now += 8
    assert shown.images_per_second(30) == 40


def test_the_time_left_is_that_of_the_steps_to_come_at_the_pace_of_this_process(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 of the steps were made before: 20 in 240 s leave 20 more for 4 minutes."""
    shown = TrainingProgress(total_steps=50, start_step=10, images_per_step=32, shown=True)
    clock.now += 240
    shown.show(30, 1.5, 0.25, 0.001, 80.4)
    assert capsys.readouterr().out == "step 30/50  epoch 1.50  loss 0.2500  lr 1.00e-03  80 images/s  4.0 min left\n"
    TrainingProgress(50, 10, 32, shown=False).show(30, 1.5, 0.25, 0.001, 80.4)
    assert capsys.readouterr().out == ""
