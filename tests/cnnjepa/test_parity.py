"""One training step equals the official implementation's, in float64: figures measured on it, tensors drawn by recipe."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnjepa.config import EncoderConfig, EncoderName, Execution, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method, masked_prediction_loss
from cnnjepa.models.masked import Visibility

CASES = json.loads((Path(__file__).parent / "parity_step.json").read_text())


def draw_tensors(module: nn.Module, seed: int) -> None:
    """The recipe of the figures: one generator a module, keys in sorted order, float32."""
    g = torch.Generator().manual_seed(seed)
    state = module.state_dict()
    for key in sorted(state):
        shape, name = state[key].shape, key.rsplit(".", 1)[-1]
        if name == "num_batches_tracked":
            state[key] = torch.zeros(shape, dtype=torch.long)
        elif name == "running_var" or (len(shape) == 1 and name == "weight"):
            state[key] = 0.5 + torch.rand(shape, generator=g)
        elif len(shape) == 1:
            state[key] = 0.1 * torch.randn(shape, generator=g)
        else:
            state[key] = torch.randn(shape, generator=g) * (2 / state[key][0].numel()) ** 0.5
    module.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.parametrize("execution", list(Execution), ids=lambda e: e.name)
@pytest.mark.parametrize("case", CASES, ids=[f"{c['arch']}-{c['size']}" for c in CASES])
def test_every_figure_is_reproduced(case: dict, execution: Execution) -> None:
    size, batch = case["size"], case["batch"]
    encoder = EncoderConfig(EncoderName[case["arch"]], execution=execution)
    config = TrainConfig(method=Config(), encoder=encoder, data=DataConfig(image_size=size))
    method = Method(config, total_steps=1)
    for seed, module in ((1, method.encoder), (2, method.target_encoder), (3, method.predictor)):
        draw_tensors(module, seed)
    token = 0.02 * torch.randn(1, method.encoder.out_channels, 1, 1, generator=torch.Generator().manual_seed(4))
    method.mask_token.data.copy_(token)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5)).double()
    visibility = Visibility(torch.tensor(case["context_mask"]).bool())

    method.double().train()
    out = method.predict(images, visibility)
    loss = masked_prediction_loss(out["prediction"], out["target"], visibility)
    loss.backward()

    parameters, buffers = dict(method.named_parameters()), dict(method.named_buffers())
    ours = {"loss": loss.item()}
    official = {"loss": case["loss"]}
    for name, features in out.items():
        ours |= {f"norm {name}": features.norm().item(), f"sum {name}": features.sum().item()}
        official |= {f"norm {name}": case["feature_norm"][name], f"sum {name}": case["feature_sum"][name]}
    for name, figure in case["grad_norm"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        ours[name], official[name] = gradient.norm().item(), figure
    for name, figure in case["running"].items():
        ours[name], official[name] = buffers[name.replace("target.", "target_encoder.")].norm().item(), figure
    assert len(ours) == 28
    assert ours == pytest.approx(official, rel=1e-9, abs=0)
