"""Compute schedules as pure functions of the step: nothing to save or restore."""

import math

from cnnjepa.config import EmaConfig, OptimizerConfig, Schedule


def interpolate(schedule: Schedule, start: float, end: float, progress: float) -> float:
    """Interpolate from `start` at progress 0 to `end` at progress 1.

    `constant` always returns `start`. Progress is clipped to [0, 1].
    """
    progress = min(max(progress, 0.0), 1.0)
    if schedule is Schedule.constant:
        return start
    if schedule is Schedule.linear:
        return start + (end - start) * progress
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of 0-based `step`.

    It rises linearly from lr/warmup steps to lr, then follows a cosine to final_lr_fraction x lr at
    the last step.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return interpolate(Schedule.cosine, config.lr, config.lr * config.final_lr_fraction, progress)


def weight_decay(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the weight decay of 0-based `step`.

    It follows a cosine from weight_decay to final_weight_decay_fraction x weight_decay.
    """
    start = config.weight_decay
    return interpolate(Schedule.cosine, start, start * config.final_weight_decay_fraction, step / max(total_steps - 1, 1))


def ema_momentum(config: EmaConfig, step: int, total_steps: int) -> float:
    """Return the momentum after 0-based `step`.

    It goes from momentum_start at the first step to momentum_end at the last.
    """
    return interpolate(config.schedule, config.momentum_start, config.momentum_end, step / max(total_steps - 1, 1))
