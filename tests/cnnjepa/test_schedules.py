import pytest

from cnnjepa.config import EmaConfig, OptimizerConfig, Schedule
from cnnjepa.schedules import ema_momentum, interpolate, learning_rate, weight_decay


def test_learning_rate_warms_up_then_decays_to_its_final_fraction() -> None:
    config = OptimizerConfig(lr=0.01, warmup_epochs=10, final_lr_fraction=0.001)
    rates = [learning_rate(config, step, 5, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 50)
    assert rates[49] == rates[50] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[:50] == sorted(rates[:50])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[(50 + 999) // 2] == pytest.approx((0.01 + 1e-5) / 2, rel=0.01)


def test_the_steps_of_the_learning_rate_are_these_numbers() -> None:
    """By hand: a warm-up of 2 steps, then cosines of 0, 45, 90, 135 and 180 degrees between 1 and 0.2."""
    config = OptimizerConfig(lr=1.0, warmup_epochs=0.5, final_lr_fraction=0.2)
    rates = [learning_rate(config, step, 4, 7) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.88284271247, 0.6, 0.31715728753, 0.2], rel=1e-9)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_epochs=0, final_lr_fraction=0.2), 0, 4, 7) == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.cosine, [0.6, 0.65857864376, 0.8, 0.94142135624, 1.0]),  # cosines of 0, 45, 90, 135 and 180 degrees
        (Schedule.linear, [0.6, 0.7, 0.8, 0.9, 1.0]),
        (Schedule.constant, [0.6] * 5),
    ],
)
def test_ema_momentum_is_its_schedule_at_each_step(schedule: Schedule, expected: list[float]) -> None:
    config = EmaConfig(0.6, 1.0, schedule)
    assert [ema_momentum(config, step, 5) for step in range(5)] == pytest.approx(expected, rel=1e-9)
    assert (ema_momentum(config, 0, 5), ema_momentum(config, 4, 5)) == (expected[0], expected[-1])


def test_a_run_of_one_step_has_the_first_value_of_each_schedule() -> None:
    assert ema_momentum(EmaConfig(0.6, 1.0), 0, 1) == 0.6
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_epochs=0, final_lr_fraction=0.2), 0, 1, 1) == 1.0
    assert weight_decay(OptimizerConfig(weight_decay=0.3, final_weight_decay_fraction=2), 0, 1) == 0.3


def test_cosine_is_flat_at_both_ends() -> None:
    assert interpolate(Schedule.cosine, 0, 1, 0.01) < 0.001
    assert interpolate(Schedule.cosine, 0, 1, 0.5) == pytest.approx(0.5)
    assert interpolate(Schedule.linear, 0, 1, 0.25) == 0.25
