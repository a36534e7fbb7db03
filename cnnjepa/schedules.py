"""Compute schedules as pure functions of the step: nothing to save or restore."""

import math

from cnnjepa.config import EmaConfig, OptimizerConfig, Schedule


def interpolate(schedule: Schedule, start: float, end: float, progress: float) -> float:
    """Interpolate from `start` to `end` at `progress`, clipped to [0, 1]; constant: `start`."""
    progress = min(max(progress, 0.0), 1.0)
    if schedule is Schedule.constant:
        return start
    if schedule is Schedule.linear:
        return start + (end - start) * progress
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of 0-based `step`.

    It rises linearly over the warm-up, then falls by a cosine to final_lr_fraction x lr.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return interpolate(Schedule.cosine, config.lr, config.lr * config.final_lr_fraction, progress)


def weight_decay(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the weight decay of 0-based `step`: a cosine, in the end x the final fraction."""
    start = config.weight_decay
    return interpolate(Schedule.cosine, start, start * config.final_weight_decay_fraction, step / max(total_steps - 1, 1))


def ema_momentum(config: EmaConfig, step: int, total_steps: int) -> float:
    """Return the momentum after 0-based `step`, from momentum_start to momentum_end at the last."""
    return interpolate(config.schedule, config.momentum_start, config.momentum_end, step / max(total_steps - 1, 1))
