"""The exported backbone loads into torchvision and timm with only the classifier missing, and gives the run's own features."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file

from cnnjepa.config import method_module
from cnnjepa.models.encoders import build_encoder
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import signature
from cnnjepa.train import train
from jobs.config import compose_job
from jobs.export import export
from tests.cnnjepa.methods.test_methods import METHODS, small

BASE = ["epochs=1", "optimizer.warmup_epochs=0", "global_batch_size=4", "micro_batch_size=4", "data.train_limit=8", "data.test_limit=8"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_target_backbone_loads_elsewhere(tmp_path: Path, name: str) -> None:
    job = compose_job(
        [*BASE, f"encoder.name={name}", "data.image_size=96", "data.holdout_fraction=0.25", "probes.names=[]", f"run_dir={tmp_path}"]
    )
    folder = RunFolder(tmp_path)
    folder.prepare(job.train)
    if name == "resnet50":  # the checkpoint of a training that has moved all weights and running statistics, less its moments
        drawn = torch.Generator().manual_seed(0)
        state = method_module("cnn_jepa").Method(job.train, 1).state_dict()
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=drawn) * tensor.abs().mean().clamp_min(0.5)
        checkpoint.save(folder.checkpoints, 2, {"step": 2, "method": state}, keep=2)
    else:
        train(job.train, folder)
    assert export(tmp_path, tmp_path / "backbone.safetensors") == 2
    weights = load_file(tmp_path / "backbone.safetensors")

    found = checkpoint.newest_good(folder.checkpoints)
    assert found is not None
    method = method_module("cnn_jepa").Method(job.train, 1)
    method.load_state_dict(checkpoint.read(found, torch.device("cpu"))["method"])
    images = torch.randn(2, 3, 96, 96)
    expected = method.target_encoder.eval()(images).mean((2, 3))

    theirs = getattr(torchvision.models, name)()
    missing = theirs.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"}
    assert missing.unexpected_keys == []
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(theirs.eval()(images), expected, rtol=1e-4, atol=1e-5)

    other = timm.create_model(name)
    missing = other.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) == {"fc.weight", "fc.bias"}
    assert missing.unexpected_keys == []
    other.reset_classifier(0)
    torch.testing.assert_close(other.eval()(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_methods_probed_encoder_is_exported(tmp_path: Path, name: str) -> None:
    config = small(name, epochs=1)
    folder = RunFolder(tmp_path)
    folder.prepare(config)
    train(config, folder)
    assert export(tmp_path, tmp_path / "backbone.safetensors") == 5
    with safe_open(tmp_path / "backbone.safetensors", "pt") as file:
        about = {
            "format": "pt",
            "encoder": config.encoder.name.name,
            "method": name,
            "channels": "3",
            "step": "5",
            "signature": signature(config),
        }
        assert file.metadata() == about
    method = method_module(name).Method(config, 1)
    encoder = build_encoder(config.encoder, config.data.image_size, 99)
    encoder.load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    found = checkpoint.newest_good(folder.checkpoints)
    assert found is not None
    method.load_state_dict(checkpoint.read(found, torch.device("cpu"))["method"])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.eval()(images), method.probe_encoder.eval()(images))


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a run folder must hold config\.yaml"):
        export(tmp_path, tmp_path / "x")
    RunFolder(tmp_path).prepare(compose_job(BASE).train)
    with pytest.raises(ValueError, match="must hold an intact checkpoint to export"):
        export(tmp_path, tmp_path / "x")
