"""`visible` comes to what the network itself comes to with every map masked, in float64: features, gradients, running statistics."""

import copy
import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from cnnjepa.models import visible, visible_tiles
from tests.support.documented import example
from tests.support.masked_reference import Masked
from tests.support.sample import sampled

TOLERANCE = 1e-9  # of the largest value of each tensor

# By what is new in each.
_TIMM = """
    resnet18 resnet26 resnet50 wide_resnet50_2 resnet26t resnet50d resnetaa50 resnext50_32x4d res2net50_26w_4s
    seresnet50 seresnext50_32x4d legacy_seresnet18 ecaresnet26t resnetrs50
    resnet50_gn resnetv2_50 resnetv2_50d_gn nf_resnet26 nfnet_l0
    regnetx_002 regnety_002 regnetz_005 gernet_s repvgg_a0 mobileone_s0
    mobilenetv2_100 mobilenetv3_small_100 mobilenetv3_large_100 mnasnet_100 efficientnet_b0 efficientnetv2_rw_t mixnet_s lcnet_050
    tinynet_e ghostnet_100 rexnet_100
    convnext_atto convnext_tiny convnextv2_atto rdnet_tiny starnet_s1 fastvit_t8
    densenet121 dpn68 vovnet39a ese_vovnet19b_dw dla34 selecsls42 cspresnet50 darknet53 xception41 vgg11 vgg11_bn
"""
TIMM = _TIMM.split()
# Cheap, and together with most kinds of layers: run in `make test` always.
ALWAYS = ["resnet18", "regnety_002", "convnext_atto", "mobilenetv3_small_100"]


def lively(model: nn.Module) -> nn.Module:
    """Weights that hide nothing: no branch is scaled to zero, no bias is zero."""
    generator = torch.Generator().manual_seed(1)

    def draw(p: Tensor, low: float, high: float) -> None:
        p.data = torch.rand(p.shape, generator=generator) * (high - low) + low

    for name, p in model.named_parameters():
        if name.endswith("bias"):
            draw(p, -0.5, 0.5)
        elif p.ndim <= 1 or p.numel() == max(p.shape):
            draw(p, 0.5, 1.5)
        elif not p.any():
            draw(p, -0.1, 0.1)
    for name, b in model.named_buffers():
        if "running" in name:
            draw(b, 0.5, 1.5)
    return model.double().train()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unequal() -> Tensor:
    """Three images of 2 x 3 cells, of which four, three and one are visible."""
    mask = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 1, 0], [0, 1, 1]], [[0, 0, 0], [0, 0, 1]]])
    return mask.bool()


def all_visible() -> Tensor:
    return torch.ones(2, 2, 3, dtype=torch.bool)


def batch_of_one() -> Tensor:
    """Seven of twelve cells: BatchNorm over the three or four numbers of fewer cells blows up any rounding, layer after layer."""
    return torch.tensor([[[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1]]]).bool()


def one_image_sees_nothing() -> Tensor:
    return torch.stack([unequal()[0], torch.zeros(2, 3, dtype=torch.bool), unequal()[1]])


def one_cell() -> Tensor:
    return torch.tensor([[[0, 0, 0], [0, 1, 0]]]).bool()


MASKS = [unequal, all_visible, batch_of_one, one_image_sees_nothing]


def assert_close(a: Tensor, b: Tensor, what: str, at_least: float = 0) -> None:
    assert (a - b).abs().max().item() <= TOLERANCE * max(b.abs().max().item(), at_least), what


def whole_image_masked(images: Tensor, mask: Tensor) -> Tensor:
    cell = images.shape[-1] // mask.shape[-1]
    return images * mask.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]


def assert_same_pass(model: nn.Module, mask: Tensor, features: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
    """Features, gradients of all parameters and of the images, and buffers."""
    model.zero_grad()
    expected_model = copy.deepcopy(model)
    net = visible(model)
    b, h, w = mask.shape
    images = drawn(b, 3, h * net.cell, w * net.cell, seed=2).requires_grad_()
    same_images = images.detach().clone().requires_grad_()
    torch.manual_seed(0)
    found = net(images, mask)
    torch.manual_seed(0)
    with Masked(mask):
        masked = whole_image_masked(same_images, mask)
        expected = features(expected_model, masked) if features else expected_model.forward_features(masked)  # type: ignore[operator]
    assert_close(found, expected, "features")
    assert not found[(~mask)[:, None].expand_as(found)].any()
    loss_of = drawn(*found.shape, seed=3)
    for out in (found, expected):
        (out * loss_of).sum().backward()
    # Some gradients are sums that cancel: what shifts all positions of a channel alike is taken away by the next norm.
    cancelled = 1e-3 * max(p.grad.abs().max().item() for p in expected_model.parameters() if p.grad is not None)
    compared = 0
    for (name, p), q in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name  # a head that `visible` does not run
        if p.grad is not None and q.grad is not None:
            assert_close(p.grad, q.grad, name, cancelled)
            compared += 1
    assert compared > 1
    assert images.grad is not None
    assert same_images.grad is not None
    assert_close(images.grad, same_images.grad, "image")
    for (name, c), d in zip(model.named_buffers(), expected_model.buffers(), strict=True):
        assert_close(c.double(), d.double(), name)


def build(name: str, **kwargs: Any) -> nn.Module:
    return lively(timm.create_model(name, num_classes=0, **kwargs))


def named(names: list[str], count: int) -> list[Any]:
    parameters = [pytest.param(name, id=name) for name in names if name not in ALWAYS]
    return [*(pytest.param(name, id=name) for name in names if name in ALWAYS), *sampled(parameters, count, "CNNs of timm")]


@pytest.mark.parametrize("name", named(TIMM, 6))
def test_a_cnn_of_timm_equals_the_masked_one(name: str) -> None:
    assert_same_pass(build(name), unequal())


@pytest.mark.parametrize("mask", MASKS[1:], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", [*ALWAYS, *sampled(["resnet50d", "resnet50_gn", "efficientnet_b0", "densenet121"], 1, "masks")])
def test_any_mask(name: str, mask: Callable[[], Tensor]) -> None:
    assert_same_pass(build(name), mask())


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "resnet50_gn", "nf_resnet26"])
def test_one_visible_cell_in_a_whole_batch(name: str) -> None:
    assert_same_pass(build(name), one_cell())


TORCHVISION = {
    "resnet18": lambda m, x: m.layer4(m.layer3(m.layer2(m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))))),
    "resnext50_32x4d": lambda m, x: m.layer4(m.layer3(m.layer2(m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))))),
    "densenet121": lambda m, x: F.relu(m.features(x)),
    "mobilenet_v3_small": lambda m, x: m.features(x),
    "efficientnet_b0": lambda m, x: m.features(x),
    "regnet_y_400mf": lambda m, x: m.trunk_output(m.stem(x)),
    "convnext_tiny": lambda m, x: m.features(x),
    "vgg11_bn": lambda m, x: m.features(x),
}


@pytest.mark.parametrize("name", sampled(list(TORCHVISION), 3, "CNNs of torchvision"))
def test_a_cnn_of_torchvision_equals_the_masked_one(name: str) -> None:
    assert_same_pass(lively(torchvision.models.get_model(name)), unequal(), TORCHVISION[name])


def test_evaluation_takes_running_statistics_and_leaves_them() -> None:
    model = build("regnety_002").eval()
    before = copy.deepcopy(model.state_dict())
    assert_same_pass(model, unequal())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    model.train()
    model.s1.b1.conv1.bn.eval()  # a frozen norm stays frozen
    assert_same_pass(model, unequal())


def test_drop_path_drops_the_same_images() -> None:
    assert_same_pass(build("convnext_atto", drop_path_rate=0.5), unequal())


@pytest.mark.parametrize("name", ["convnext_atto", "regnety_002"])
@pytest.mark.parametrize("whole", [pytest.param(torch.inf, id="windows"), pytest.param(0, id="whole")])
def test_wide_and_grouped_kernels_both_ways(name: str, whole: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_tiles, "WHOLE", whole)
    assert_same_pass(build(name), unequal())


class Odd(nn.Module):
    """What no named network has at once: kernels wider than a tile, dilation, pools with padding, activations that are not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, 2)
        self.norm = nn.GroupNorm(4, 8)
        self.wide = weight_norm(nn.Conv2d(8, 8, 9, padding="same", groups=2))
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.average = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.largest = nn.MaxPool2d(3, 1, 1)
        self.down = nn.Conv2d(12, 8, 5, 2, 2, groups=4)
        self.act = nn.Sequential(nn.Sigmoid(), nn.PReLU(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x - 0.5)))
        x = self.average(self.wide(x) * torch.sigmoid(self.dilated(x)))
        x = self.largest(torch.cat([x[:, :4], x.tanh()], 1) - 0.25)
        a, b = self.down(x).split([2, 6], dim=1)
        return torch.cat([b, F.silu(a) + x.mean((2, 3), keepdim=True)[:, :2]], 1)


@pytest.mark.parametrize("mask", [*MASKS, one_cell], ids=lambda m: m.__name__)
@pytest.mark.parametrize("whole", [pytest.param(torch.inf, id="windows"), pytest.param(0, id="whole")])
def test_kernels_and_pools_of_any_size(whole: float, mask: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_tiles, "WHOLE", whole)
    assert_same_pass(lively(Odd()), mask(), lambda m, x: m(x))


def test_a_cut_of_what_was_averaged_needs_its_rows_and_columns() -> None:
    assert visible(Odd()).cell == 8


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "densenet121"])
def test_stages_are_the_outputs_of_the_modules_that_are_named(name: str) -> None:
    model, mask, maps = build(name).eval(), unequal(), {}
    net = visible(model)
    images = drawn(3, 3, 2 * net.cell, 3 * net.cell, seed=2)
    found = net(images, mask, stages=True)
    assert len(found) == len(net.stage_names) == 5
    for stage in net.stage_names:
        model.get_submodule(stage).register_forward_hook(lambda m, x, out, stage=stage: maps.update({stage: out}))
    with Masked(mask), torch.no_grad():
        model.forward_features(whole_image_masked(images, mask))  # type: ignore[operator]
    for stage, map_ in zip(net.stage_names, found, strict=True):
        assert_close(map_, maps[stage], stage)
    assert [f.shape[-1] for f in found] == [3 * net.cell // reduction for reduction in (2, 4, 8, 16, 32)]


def test_stages_may_be_named() -> None:
    net = visible(torchvision.models.resnet18())
    assert net.stage_names == ["relu", "layer1", "layer2", "layer3", "layer4"]
    images, mask = torch.randn(3, 3, 64, 96), unequal()
    whole, named_ones = net(images, mask), net(images, mask, stages=["layer2.0", "layer4"])
    assert [f.shape[1] for f in named_ones] == [128, 512]
    assert torch.equal(whole, named_ones[1])
    with pytest.raises(ValueError, match="no module layer9 with a feature map; there are conv1, bn1"):
        net(images, mask, stages=["layer9"])


def test_the_model_keeps_its_parameters_its_keys_and_its_optimizer() -> None:
    model = build("resnet18")
    keys, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), 0.1)
    net = visible(model)
    assert list(model.state_dict()) == keys
    assert list(map(id, net.parameters())) == list(map(id, model.parameters()))
    before = copy.deepcopy(model.state_dict())
    net(drawn(3, 3, 64, 96, seed=0), unequal()).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in keys)
    assert model.bn1.num_batches_tracked == 1
    net.eval()
    assert not model.layer1[0].bn1.training


def test_a_copy_has_parameters_of_its_own() -> None:
    net, images = visible(build("regnety_002").eval()), drawn(3, 3, 64, 96, seed=0)
    before = net(images, unequal())
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    for other in (copy.deepcopy(net), torch.load(saved, weights_only=False)):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not torch.equal(other(images, unequal()), before)
        assert torch.equal(net(images, unequal()), before)


def test_layouts_of_masks() -> None:
    net, images, mask = visible(build("resnet18").eval()), drawn(3, 3, 64, 96, seed=0), unequal()
    whole = net(images, mask)
    assert torch.equal(net(images, mask[:, None]), whole)  # as SparK has it
    assert torch.equal(net(images), net(images, torch.ones_like(mask)))
    assert not torch.equal(net(images), whole)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_100", "resnet50_gn"])
def test_bf16_stays_as_near_to_float64_as_the_masked_network(name: str) -> None:
    model, images, mask = build(name), drawn(3, 3, 64, 96, seed=0), unequal()
    truth = visible(copy.deepcopy(model))(images, mask)
    single, reference = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = visible(single)(images.float(), mask)
        with Masked(mask):
            expected = reference.forward_features(whole_image_masked(images.float(), mask))  # type: ignore[operator]
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in single.parameters() if p.grad is not None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dense = reference.forward_features(images.float())  # type: ignore[operator]
    assert found.dtype is dense.dtype
    error, reference_error = ((f.double() - truth).norm() / truth.norm() for f in (found, expected))
    assert error < max(0.02, 1.5 * reference_error)


def test_hidden_pixels_are_never_read() -> None:
    net, images, mask = visible(build("resnet18")), drawn(3, 3, 64, 96, seed=0), unequal()
    other = torch.where(whole_image_masked(torch.ones_like(images), mask).bool(), images, drawn(3, 3, 64, 96, seed=9))
    assert torch.equal(net(images, mask), net(other, mask))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_002"])
def test_only_visible_positions_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_tiles, "WHOLE", torch.inf)
    model, images, mask = build(name).float(), torch.randn(3, 3, 64, 96), unequal()
    done = []
    for features in (lambda: visible(model)(images, mask), lambda: model.forward_features(images)):  # type: ignore[operator]
        with FlopCounterMode(display=False) as counter:
            features().sum().backward()
        done.append(counter.get_total_flops())
    assert done[0] < done[1] * mask.float().mean() * 1.05  # the gates of squeeze-and-excitation are those of whole images


def test_asking_for_visible_imports_neither_timm_nor_torchvision() -> None:
    code = "import sys; from cnnjepa.models import visible; visible.__name__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "torchvision", "torch._dynamo", "sympy"} & set(loaded)
    code = "import sys, cnnjepa.models.masked; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "cnnjepa.models.visible_net" not in loaded


def test_the_guides_example_runs(tmp_path: Path) -> None:
    (tmp_path / "guide.py").write_text(example("visible.md", "python"))
    names = runpy.run_path(str(tmp_path / "guide.py"))
    assert names["features"].shape == (4, 512, 7, 7)
    assert [m.shape[-1] for m in names["maps"]] == [112, 56, 28, 14, 7]
    assert all(p.grad is not None for name, p in names["model"].named_parameters() if not name.startswith("fc"))
