"""Compute schedules as pure functions of the step: nothing to save or restore."""

import math

from cnnjepa.config import EmaConfig, OptimizerConfig, RateSchedule, Schedule


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


def stable_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Return the steps before the decay of wsd; in them nothing depends on how long the run is."""
    return total_steps - max(round(config.decay_fraction * total_steps), 1)


def progress(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return how far 0-based `step` is, from 0 to 1: in the run, or with wsd in its decay."""
    if config.schedule is RateSchedule.cosine:
        return step / max(total_steps - 1, 1)
    stable = stable_steps(config, total_steps)
    return max(step - stable + 1, 0) / (total_steps - stable)


def learning_rate(config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of 0-based `step`.

    It rises linearly from lr/warmup steps to lr. Then it follows a cosine to final_lr_fraction x lr
    at the last step. With wsd it stays, and in the decay falls there as 1 - sqrt(share of the decay)
    (Hägele et al. 2024, arXiv 2405.18392).
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule is RateSchedule.wsd:
        return config.lr * (1 - (1 - config.final_lr_fraction) * math.sqrt(progress(config, step, total_steps)))
    share = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return interpolate(Schedule.cosine, config.lr, config.lr * config.final_lr_fraction, share)


def weight_decay(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the weight decay of 0-based `step`.

    It follows a cosine from weight_decay to final_weight_decay_fraction x weight_decay, over the run
    or with wsd over its decay.
    """
    start = config.weight_decay
    return interpolate(Schedule.cosine, start, start * config.final_weight_decay_fraction, progress(config, step, total_steps))


def ema_momentum(config: EmaConfig, step: int, total_steps: int, optimizer: OptimizerConfig | None = None) -> float:
    """Return the momentum after 0-based `step`.

    It goes from momentum_start at the first step to momentum_end at the last; with the wsd of
    `optimizer` it stays until the decay.
    """
    share = progress(optimizer or OptimizerConfig(), step, total_steps)
    return interpolate(config.schedule, config.momentum_start, config.momentum_end, share)
