"""A configuration that trains in seconds."""

from cnnjepa.config import DATA_PRESETS, CheckpointConfig, EncoderConfig, LogConfig, OptimizerConfig, ProbeConfig, TrainConfig
from cnnjepa.methods.cnn_jepa import Config


def tiny_config(**changes: object) -> TrainConfig:
    """digits, 8 channels, 2 epochs of 4 steps of 32 images."""
    config = TrainConfig(
        method=Config(),
        data=DATA_PRESETS["digits"],
        encoder=EncoderConfig(width=8),
        optimizer=OptimizerConfig(lr=0.002, warmup_epochs=0.5),
        probes=ProbeConfig(linear_epochs=5),
        epochs=2,
        global_batch_size=32,
        micro_batch_size=16,
        checkpoint=CheckpointConfig(every_minutes=0.0),
        log=LogConfig(every_steps=1, images_every_epochs=1, tensorboard=False),
    )
    config.data = type(config.data)(**{**vars(config.data), "train_limit": 160, "test_limit": 60})
    for key, value in changes.items():
        setattr(config, key, value)
    return config
