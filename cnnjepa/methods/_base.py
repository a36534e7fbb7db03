"""Base of all methods: an encoder, weights that depend only on the seed, and defaults."""

from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import MethodConfig, Precision, TrainConfig, method_module
from cnnjepa.data.datasets import Splits
from cnnjepa.data.views import ViewSpec
from cnnjepa.models.encoders import Encoder, build_encoder
from cnnjepa.randomness import Stream, integer

Settings = TypeVar("Settings", bound=MethodConfig)


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights; bf16 is autocast around fp32 weights."""
    return torch.float64 if config.precision is Precision.fp64 else torch.float32


def build_method(config: TrainConfig, total_steps: int, device: torch.device) -> Any:
    """Return the method of `config` with its initial weights, in training mode on `device`."""
    method = method_module(config.method.name).Method(config, total_steps)
    return method.to(device=device, dtype=weights_dtype(config), memory_format=torch.channels_last).train()


class BaseMethod(nn.Module, Generic[Settings]):
    """Base class of `Method` in each file of cnnjepa/methods. `settings` is the method's Config.

    `splits` are the images of the run, set before its first step. Subclasses define `build`, `views`
    and `forward`, and override what differs.
    """

    splits: Splits

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        super().__init__()
        self.config, self.total_steps = config, total_steps
        self.settings = cast(Settings, config.method)
        seed = integer(config.seed, Stream.weights, 0)
        self.encoder: Encoder = build_encoder(config.encoder, config.data.image_size, seed, config.data.channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(config.seed, Stream.weights, 1))
            self.build()

    def build(self) -> None:
        """Add the modules beside the encoder. Their weights depend only on the seed."""
        raise NotImplementedError

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Load weights into the encoder and into every copy of it, such as a target."""
        for module in self.modules():
            if type(module) is type(self.encoder):
                module.load_state_dict(state)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return the views to draw of each image."""
        raise NotImplementedError

    @property
    def probe_encoder(self) -> Encoder:
        """Return the network that is probed and exported: the encoder that gradients train."""
        return self.encoder

    def after_step(self, step: int) -> dict[str, Any]:
        """Finish optimiser step `step`; return values to log."""
        return {}

    def sample_images(self, batch: Batch) -> dict[str, Tensor]:
        """Return pictures to log: the views."""
        return batch.pictures()
