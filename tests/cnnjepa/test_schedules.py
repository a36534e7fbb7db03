import pytest

from cnnjepa.config import EmaConfig, OptimizerConfig, Schedule
from cnnjepa.schedules import ema_momentum, interpolate, learning_rate


def test_learning_rate_warms_up_then_decays_to_its_final_fraction() -> None:
    config = OptimizerConfig(lr=0.01, warmup_epochs=10, final_lr_fraction=0.001)
    rates = [learning_rate(config, step, 5, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 50)
    assert rates[49] == rates[50] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[:50] == sorted(rates[:50])
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[(50 + 999) // 2] == pytest.approx((0.01 + 1e-5) / 2, rel=0.01)


def test_ema_momentum_ends_where_it_shall() -> None:
    for schedule in (Schedule.cosine, Schedule.linear):
        config = EmaConfig(0.996, 1.0, schedule)
        assert ema_momentum(config, 0, 100) == 0.996
        assert ema_momentum(config, 99, 100) == 1.0
    assert ema_momentum(EmaConfig(0.99, 1.0, Schedule.constant), 99, 100) == 0.99


def test_cosine_is_flat_at_both_ends() -> None:
    assert interpolate(Schedule.cosine, 0, 1, 0.01) < 0.001
    assert interpolate(Schedule.cosine, 0, 1, 0.5) == pytest.approx(0.5)
    assert interpolate(Schedule.linear, 0, 1, 0.25) == 0.25
