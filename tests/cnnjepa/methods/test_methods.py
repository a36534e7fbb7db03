"""What every method must keep, whatever it computes: each file of cnnjepa/methods is found and put through the same tests."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, Precision, TrainConfig, method_module, method_names, optimizer_presets
from cnnjepa.data.views import ViewSpec
from cnnjepa.masking import draw_blocks
from cnnjepa.rules import validate
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunError, RunStatus
from cnnjepa.run.identity import from_dict, to_dict
from cnnjepa.train import CollapsedError
from tests.cnnjepa.test_distributed import Launched, assert_close, finish
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import tiny_config

# What each needs to be small, and what lets 2 ranks add up to 1: as many hidden cells in every sample.
SMALL: dict[str, dict] = {
    "cnn_jepa": {"mask": {"strategy": "random"}},
    "simclr": {"hidden": 24, "projection": 12},
    "byol": {"hidden": 24, "projection": 12},
    "vicreg": {"width": 24},
    "ijepa": {"predictor_width": 48, "predictor_depth": 1},
    "spark": {"decoder_width": 16},
    "lejepa": {"hidden": 24, "projection": 12, "directions": 32, "local_views": 2, "local_size": 16},
}
SMALL_ENCODER = {"ijepa": {"name": "vit_tiny", "width": 32, "patch_size": 8, "vit_depth": 2}}
# Of the methods with a target: the modules that no gradient may reach, and whose weights they follow.
TARGETS = {
    "cnn_jepa": {"target_encoder": "encoder"},
    "byol": {"target_encoder": "encoder", "target_projector": "projector"},
    "ijepa": {"target_encoder": "encoder"},
}
UNTRAINED = {"random"}
METHODS = method_names()
TRAINED = [m for m in METHODS if m not in UNTRAINED]


def merged(values: dict, more: dict) -> dict:
    return {**values, **{k: merged(values[k], v) if isinstance(v, dict) else v for k, v in more.items()}}


def small(name: str, **changes: object) -> TrainConfig:
    """`tiny_config` with that method, its optimiser's kind, and micro-batches as large as the batch."""
    values = to_dict(tiny_config(micro_batch_size=32))
    values["method"] = merged(to_dict(method_module(name).Config()), SMALL.get(name, {}))
    values["encoder"] = merged(values["encoder"], SMALL_ENCODER.get(name, {}))
    preset = to_dict(optimizer_presets()[name])
    values["optimizer"] = {**preset, "lr": 0.2 if preset["name"] == "lars" else 0.002, "warmup_epochs": 0.5}
    config = from_dict(values)
    for key, value in changes.items():
        setattr(config, key, value)
    validate(config)
    return config


def assert_refused(name: str, changes: dict[str, float], says: str) -> None:
    """The small configuration of a method with other settings breaks a rule, and is told so."""
    config = small(name)
    for key, value in changes.items():
        setattr(config.method, key, value)
    with pytest.raises(ValueError, match=f"^{says}$"):
        validate(config)


def build(config: TrainConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    method: nn.Module = method_module(config.method.name).Method(config, total_steps=10)
    return method.to(dtype).train()


def batch_for(config: TrainConfig, method: nn.Module, size: int = 8, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    g = torch.Generator().manual_seed(step)
    views = [torch.randn(size, 3, v.size, v.size, generator=g).to(dtype) for v in method.views(config)]  # type: ignore[operator]
    return Batch(views, step, np.arange(size), torch.arange(size) % 10)


def lively(method: nn.Module) -> nn.Module:
    """Weights that start at 0 would hide the branches behind them from a test."""
    g = torch.Generator().manual_seed(1)
    for module in method.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not parameter.any():
                parameter.data.copy_(torch.empty(parameter.shape).uniform_(0.5, 1.5, generator=g))
    return method


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_one_finite_number(name: str) -> None:
    config = small(name)
    method = build(config)
    out = method(batch_for(config, method))
    assert out["loss"].shape == ()
    assert out["loss"].isfinite()
    assert out["loss"].requires_grad
    assert set(method.sample_images(batch_for(config, method))) or name in UNTRAINED  # type: ignore[operator]


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_reach_every_weight_of_the_encoder_and_none_of_a_target(name: str) -> None:
    config = small(name)
    method = lively(build(config))
    method(batch_for(config, method))["loss"].backward()
    without = [k for k, p in method.encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]  # type: ignore[union-attr]
    assert without == []
    for target in TARGETS.get(name, {}):
        module = method.get_submodule(target)
        assert len(list(module.parameters())) > 1
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_module_named_target_is_listed_here(name: str) -> None:
    """A method whose target this file did not know would escape the tests of targets."""
    found = {k for k, _ in build(small(name)).named_children() if "target" in k}
    assert found == set(TARGETS.get(name, {}))


# By hand, after 0-based step 3 of 10, a third of the way from 0.996 to 1: cosine 0.996 + 0.004 (1 - cos 60) / 2, linear 0.996 + 0.004 / 3.
MOMENTUM_AFTER_STEP_3 = {"cnn_jepa": 0.997, "byol": 0.997, "ijepa": 0.99733333333333}


@pytest.mark.parametrize("name", TARGETS)
def test_after_step_moves_the_target_towards_the_online_network(name: str) -> None:
    config = small(name)
    method = build(config, torch.float64)
    method(batch_for(config, method, dtype=torch.float64))  # the running statistics of the two differ from here on
    with torch.no_grad():
        for online in TARGETS[name].values():
            for parameter in method.get_submodule(online).parameters():
                parameter += 1
    before = copy.deepcopy(method.state_dict())
    momentum = MOMENTUM_AFTER_STEP_3[name]
    assert method.after_step(3) == {"ema_momentum": pytest.approx(momentum, rel=1e-9)}  # type: ignore[operator]
    weights = dict(method.named_parameters())
    for key, value in method.state_dict().items():
        target, _, rest = key.partition(".")
        expected = before[key]
        if key in weights and target in TARGETS[name]:
            expected = momentum * before[key] + (1 - momentum) * before[f"{TARGETS[name][target]}.{rest}"]
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_goes_round_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = small(name)
    method = build(config)
    method(batch_for(config, method))
    method.after_step(1)  # type: ignore[operator]
    saved = checkpoint.save(tmp_path, 1, {"method": method.state_dict()}, keep=2)
    other = build(config)
    for tensor in other.state_dict().values():
        tensor.fill_(3)
    other.load_state_dict(checkpoint.read(saved, torch.device("cpu"))["method"])
    assert_bitwise_equal(method.state_dict(), other.state_dict())
    batch = batch_for(config, method, step=3)
    assert torch.equal(method(batch)["loss"], other(batch)["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_weights_follow_the_seed_alone(name: str) -> None:
    first = build(small(name)).state_dict()
    torch.randn(5)
    assert_bitwise_equal(first, build(small(name)).state_dict())
    other = build(small(name, seed=9)).state_dict()
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = small(name)
    undisturbed = run(config, tmp_path / "a")
    assert undisturbed is not None
    assert undisturbed.status is RunStatus.completed
    assert {"linear.test_top1", "knn.test_top1", "collapse.rankme"} <= set(undisturbed.metrics)
    for more_steps, reached in ((2, 2), (5, 7)):  # mid-epoch, and in the second epoch of 5 steps
        calls = iter([False] * (more_steps - 1) + [True])
        assert run(config, tmp_path / "b", should_stop=lambda calls=calls: next(calls)) is None  # type: ignore[misc]
        assert checkpoint.find(tmp_path / "b" / "checkpoints")[0].step == reached
    run(config, tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert_bitwise_equal(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


@pytest.mark.parametrize("name", METHODS)
def test_a_forced_collapse_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights at 0, and steps too small to leave it: every image gets the same features."""
    config = small(name)
    config.optimizer.lr, config.probes.at_epochs = 1e-12, [1]
    module = method_module(name)
    honest = module.Method.__init__

    def collapsed(self: nn.Module, *arguments: object) -> None:
        honest(self, *arguments)
        for parameter in self.parameters():
            parameter.data.zero_()

    monkeypatch.setattr(module.Method, "__init__", collapsed)
    with pytest.raises(RunError) as raised:
        run(config, tmp_path)
    assert isinstance(raised.value.__cause__, CollapsedError)


@pytest.mark.parametrize("name", METHODS)
def test_bf16_stays_near_fp32(name: str) -> None:
    config = small(name)
    method = build(config)
    batch = batch_for(config, method, size=16)
    exact = copy.deepcopy(method)(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        coarse = method(batch)["loss"]
    assert coarse.dtype is torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.05, atol=0.02)


RANKS = """
import json, sys
from pathlib import Path
from cnnjepa.run.ranks import joined
from cnnjepa.run.ranks import Device
from cnnjepa.run.identity import from_dict
from cnnjepa.run.folder import RunFolder
from cnnjepa.train import train
with joined(Device.cpu) as ranks:
    for name, values in json.loads(sys.argv[2]).items():
        folder = RunFolder(Path(sys.argv[1]) / name)
        if ranks.is_main:
            folder.prepare(from_dict(values))
        train(from_dict(values), folder)
"""


def train_on(ranks: int, configs: dict[str, TrainConfig], path: Path) -> None:
    """Train the methods in turn, each in the folder of its name."""
    finish(Launched(ranks, ["-c", RANKS, str(path), json.dumps({name: to_dict(config) for name, config in configs.items()})]))


@pytest.mark.slow
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path: Path) -> None:
    """All methods in turn, float64, 5 steps, BatchNorm and losses over the global batch."""
    for ranks in (1, 2):
        configs = {}
        for name in METHODS:
            config = configs[name] = small(name, epochs=1, precision=Precision.fp64)
            config.encoder.sync_bn, config.micro_batch_size, config.optimizer.warmup_epochs = True, 32 // ranks, 0
            validate(config, ranks)
        train_on(ranks, configs, tmp_path / str(ranks))
    for name in METHODS:
        one, two = (final_state(tmp_path / n / name) for n in "12")
        assert one["step"] == 5
        start = build(small(name), torch.float64).state_dict()
        assert name in UNTRAINED or any(not torch.equal(v, one["method"][k]) for k, v in start.items())
        assert_close(two, one, least=10)


@pytest.mark.slow
def test_byol_on_two_ranks_without_synchronised_batchnorm_is_one_rank_with_two_micro_batches(tmp_path: Path) -> None:
    """Two passes a micro-batch: the running statistics of two ranks must be chained over both."""
    config = small("byol", epochs=1, precision=Precision.fp64)
    config.micro_batch_size = 16
    for ranks in (1, 2):
        train_on(ranks, {"byol": config}, tmp_path / str(ranks))
    assert_close(final_state(tmp_path / "2" / "byol"), final_state(tmp_path / "1" / "byol"))


@pytest.mark.parametrize("name", [m for m in METHODS if method_module(m).Config.global_batch])
def test_a_loss_over_the_global_batch_says_what_it_needs(name: str) -> None:
    config = small(name)
    config.micro_batch_size = 16
    with pytest.raises(ValueError, match=f"micro_batch_size must be global_batch_size / ranks = 32 with {name}, .*; got 16"):
        validate(config)
    with pytest.raises(ValueError, match=f"encoder.sync_bn must be true with {name} on 2 ranks, .*; got False"):
        validate(config, 2)
    config.encoder.sync_bn = True
    validate(config, 2)


def test_the_published_optimisers_and_heads_are_presets() -> None:
    presets = optimizer_presets()
    table = {n: (p.name.name, p.lr, p.weight_decay, p.decay_norms_and_biases) for n, p in presets.items()}
    assert table["cnn_jepa"] == table["byol"] == ("adamw", 0.01, 0.01, True)
    assert table["byol_imagenet1k"] == ("lars", 0.45, 1e-6, False)
    assert table["simclr"] == ("lars", 1.7, 1e-6, False)
    assert table["vicreg"] == ("lars", 0.5, 1e-6, False)
    assert table["ijepa"][0] == "adamw"
    assert table["ijepa"][2:] == (0.04, False)
    assert presets["ijepa"].weight_decay * presets["ijepa"].final_weight_decay_fraction == pytest.approx(0.4)
    assert table["spark"] == table["spark_convnext"] == ("lamb", 0.0004, 0.04, False)
    assert (presets["spark"].beta2, presets["spark_convnext"].beta2, presets["spark"].max_gradient_norm) == (0.95, 0.999, 5.0)
    assert presets["spark"].weight_decay * presets["spark"].final_weight_decay_fraction == pytest.approx(0.2)
    assert (table["lejepa"], table["lejepa_vit"]) == (("adamw", 5e-4, 5e-4, True), ("adamw", 5e-4, 0.05, True))
    assert all(p.momentum == 0.9 and p.trust_coefficient == 0.001 for p in presets.values())


def test_head_sizes_are_the_papers() -> None:
    from cnnjepa.models.heads import build_head

    with torch.device("meta"):
        head = build_head([2048, 8192, 8192, 8192], sync_bn=False)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(151e6, rel=0.01)
    assert [type(m).__name__ for m in build_head([8, 4, 2], False, last_norm=True)] == ["Linear", "HeadNorm", "ReLU", "Linear", "HeadNorm"]
    assert [type(m).__name__ for m in build_head([8, 4, 2], False)] == ["Linear", "HeadNorm", "ReLU", "Linear"]


def test_a_heads_norm_is_batchnorm_of_vectors() -> None:
    from cnnjepa.models.heads import HeadNorm

    ours, theirs = HeadNorm(6).double(), nn.BatchNorm1d(6).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_importing_the_package_or_its_methods_brings_no_framework() -> None:
    code = (
        "import sys, cnnjepa, cnnjepa.train, cnnjepa.config as c; [c.method_module(n) for n in c.method_names()];"
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'timm', 'lightly', 'pytorch_lightning', 'ray', 'hydra', 'optuna'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


PROBED = {"cnn_jepa": "target_encoder", "ijepa": "target_encoder"}  # the online encoder of all others, BYOL among them


@pytest.mark.parametrize("name", ["cnn_jepa", "ijepa", "byol", "simclr", "vicreg", "spark", "lejepa", "supervised", "random"])
def test_the_network_that_is_probed_and_exported_is_the_documented_one(name: str) -> None:
    method = build(small(name))
    assert method.probe_encoder is method.get_submodule(PROBED.get(name, "encoder"))


def test_ijepas_view_is_a_crop_of_its_own_scale_and_never_mirrored() -> None:
    config = small("ijepa")
    config.data.flip_probability, config.method.min_crop_scale = 0.7, 0.45  # type: ignore[attr-defined]
    assert method_module("ijepa").Method.views(config) == [ViewSpec(32, 0.45, 0.0, 3 / 4, 4 / 3)]


def test_ijepas_blocks_are_those_of_its_seed_step_and_positions() -> None:
    config = small("ijepa", seed=5)
    method = build(config)
    batch = batch_for(config, method)
    batch.step, batch.positions = 13, np.arange(8, 16)  # of the third epoch, and of the second micro-batch
    found = method.cells(batch)  # type: ignore[operator]
    expected = draw_blocks(method.settings.mask, 4, 5, 13, 32, np.arange(8, 16))  # type: ignore[union-attr,arg-type]
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))
    assert method(batch)["visible_fraction"].item() == pytest.approx(expected[0].shape[1] / 16)


@pytest.mark.parametrize("name", ["cnn_jepa", "ijepa", "spark"])
def test_pictures_show_what_the_context_sees_and_nothing_else(name: str) -> None:
    config = small(name)
    method = build(config)
    batch = batch_for(config, method, size=10)
    (picture,) = method.sample_images(batch).values()  # type: ignore[operator]
    assert picture.shape == (8, 3, 32, 32)
    seen = torch.zeros(10, 16, dtype=torch.bool)
    if name != "ijepa":
        seen = method.visibility(batch).visible_Bhw.flatten(1)  # type: ignore[operator]
    else:
        seen.scatter_(1, method.cells(batch)[0], True)  # type: ignore[operator]
    pixels = seen[:8].view(8, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(picture, torch.where(pixels, batch.views[0][:8], torch.zeros(())))


def test_the_mask_token_is_a_normal_of_a_fiftieth_that_is_cut_there() -> None:
    token = build(small("cnn_jepa", encoder=EncoderConfig(width=512))).mask_token
    assert isinstance(token, torch.Tensor)
    token = token.detach()
    assert token.shape == (1, 2048, 1, 1)
    assert 0.019 < float(token.abs().max()) <= 0.02
    assert float(token.std()) == pytest.approx(0.02 * 0.5396, rel=0.05)  # a normal cut at one deviation keeps 0.54 of it
