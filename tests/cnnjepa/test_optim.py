"""LARS and LAMB by their formulas, AdamW as torch's, what is decayed by shape, and schedules that leave the other optimisers alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cnnjepa.config import EncoderConfig, OptimizerConfig, OptimizerName
from cnnjepa.models.heads import build_head
from cnnjepa.models.resnet import build_encoder
from cnnjepa.optim import AdamW, build_optimizer, set_learning_rate, set_weight_decay
from cnnjepa.schedules import weight_decay
from cnnjepa.train import limit_gradients
from tests.cnnjepa.methods.test_methods import build, small
from tests.support.runs import final_state, run

LARS = OptimizerConfig(name=OptimizerName.lars, lr=0.5, weight_decay=0.1, decay_norms_and_biases=False)


def test_lars_is_its_formula() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(4).double())
    optimizer = build_optimizer(LARS, [weight, bias])
    w, b, v_w, v_b = weight.detach().clone(), bias.detach().clone(), torch.zeros(3, 4).double(), torch.zeros(4).double()
    for _ in range(4):
        g_w, g_b = torch.randn(3, 4).double(), torch.randn(4).double()
        weight.grad, bias.grad = g_w.clone(), g_b.clone()
        optimizer.step()
        scale = 0.001 * w.norm() / (g_w.norm() + 0.1 * w.norm())
        v_w = 0.9 * v_w + scale * (g_w + 0.1 * w)
        v_b = 0.9 * v_b + g_b
        w, b = w - 0.5 * v_w, b - 0.5 * v_b
    torch.testing.assert_close(weight.detach(), w)
    torch.testing.assert_close(bias.detach(), b)


LAMB = OptimizerConfig(name=OptimizerName.lamb, lr=0.5, weight_decay=0.1, beta1=0.8, beta2=0.95, decay_norms_and_biases=False)


def test_lamb_is_its_formula() -> None:
    """Algorithm 2 of the paper, with bias corrections; what is not decayed takes Adam's step."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(4).double())
    optimizer = build_optimizer(LAMB, [weight, bias])
    now = [weight.detach().clone(), bias.detach().clone()]
    m, v = ([torch.zeros_like(w) for w in now] for _ in range(2))
    for t in range(1, 5):
        gradients = [torch.randn(3, 4).double(), torch.randn(4).double()]
        weight.grad, bias.grad = (g.clone() for g in gradients)
        optimizer.step()
        for i, g in enumerate(gradients):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            r = (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-6)
            if i == 0:
                r = r + 0.1 * now[i]
                r = r * now[i].norm() / r.norm()
            now[i] = now[i] - 0.5 * r
    torch.testing.assert_close(weight.detach(), now[0])
    torch.testing.assert_close(bias.detach(), now[1])


@pytest.mark.parametrize("config", [LARS, LAMB], ids=["lars", "lamb"])
def test_a_weight_that_is_zero_moves(config: OptimizerConfig) -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))


@pytest.mark.parametrize("config", [LARS, LAMB], ids=["lars", "lamb"])
def test_ours_resume_bit_for_bit(config: OptimizerConfig) -> None:
    gradients = torch.randn(6, 3, 4)
    ends = []
    for stop in (None, 3):
        weight = nn.Parameter(torch.ones(3, 4))
        optimizer = build_optimizer(config, [weight])
        for i, gradient in enumerate(gradients):
            if i == stop:
                state, weight = optimizer.state_dict(), nn.Parameter(weight.detach().clone())
                optimizer = build_optimizer(config, [weight])
                optimizer.load_state_dict(state)
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_large_gradients_are_scaled_down_to_the_limit_and_small_ones_stay() -> None:
    for most, expected in ((0.0, 5.0), (4.0, 4.0), (5.0, 5.0), (6.0, 5.0)):
        weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
        weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
        some = SimpleNamespace(config=SimpleNamespace(optimizer=OptimizerConfig(max_gradient_norm=most)), parameters=weights)
        limit_gradients(some, torch.tensor([5.0]))  # type: ignore[arg-type]
        found = torch.cat([weights[0].grad, weights[1].grad])
        torch.testing.assert_close(found, torch.tensor([3.0, -4.0]) * expected / 5)


def test_a_run_limits_its_gradients(tmp_path: Path) -> None:
    """Momentum alone moves the norms: with gradients of no length they stay."""
    config = small("simclr", epochs=1)
    config.optimizer.max_gradient_norm = 1e-12
    run(config, tmp_path)
    end, start = final_state(tmp_path)["method"], build(config).state_dict()
    norms = [k for k in start if k.endswith("bn1.weight")]
    assert norms
    for key in norms:
        torch.testing.assert_close(end[key], start[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(OptimizerName), ids=lambda n: n.name)
def test_norms_and_biases_are_known_by_shape_whatever_they_are_called(name: OptimizerName) -> None:
    """`downsample.1.weight` and the norms of heads are among them: by name they slip through."""
    net = nn.ModuleDict({"encoder": build_encoder(EncoderConfig(width=8)), "head": build_head([32, 16, 8], False)})
    config = OptimizerConfig(name=name, decay_norms_and_biases=False)
    decayed, spared = build_optimizer(config, net.parameters()).param_groups
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for k, p in net.named_parameters() if k.endswith("bias")}
    assert {id(p) for p in spared["params"]} == norms | biases
    assert len(decayed["params"]) + len(spared["params"]) == len(list(net.parameters()))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0)


def test_the_decay_schedule_spares_what_is_not_decayed_and_is_constant_by_default() -> None:
    plain, rising = OptimizerConfig(), OptimizerConfig(weight_decay=0.04, final_weight_decay_fraction=10.0, decay_norms_and_biases=False)
    assert {weight_decay(plain, s, 100) for s in range(100)} == {0.01}
    assert [weight_decay(rising, s, 101) for s in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = build_optimizer(rising, [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))])
    set_learning_rate(optimizer, 0.3)
    set_weight_decay(optimizer, 0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0)]


def test_adamw_takes_the_steps_of_torchs_bit_for_bit() -> None:
    ours, theirs = ([torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.05, "fused": True}
    optimizers = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(4):
        for (p,), optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (p.sin() * (step + 1)).sum().backward()
            optimizer.step()
        assert torch.equal(ours[0], theirs[0])
    adam = [p.detach().clone().requires_grad_() for p in theirs]
    plain = [p.detach().clone().requires_grad_() for p in theirs]
    for of, optimizer in ((plain, AdamW(plain, weight_decay=0.0, fused=True)), (adam, torch.optim.Adam(adam, fused=True))):
        of[0].grad = torch.ones(5, 3)
        optimizer.step()
    assert torch.equal(plain[0], adam[0])


def test_lars_takes_its_momentum_and_trust_from_the_configuration() -> None:
    config = OptimizerConfig(
        name=OptimizerName.lars, lr=0.5, weight_decay=0.1, momentum=0.7, trust_coefficient=0.02, decay_norms_and_biases=False
    )
    weight = nn.Parameter(torch.full((2, 2), 2.0, dtype=torch.float64))  # its norm is 4
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.full((2, 2), 3.0, dtype=torch.float64)  # of norm 6
    optimizer.step()
    first = 0.02 * 4 / (6 + 0.1 * 4) * (3 + 0.1 * 2)
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 2 - 0.5 * first, dtype=torch.float64))
    now = 2 - 0.5 * first
    weight.grad = torch.full((2, 2), 1.0, dtype=torch.float64)
    optimizer.step()
    second = 0.7 * first + 0.02 * 2 * now / (2 + 0.1 * 2 * now) * (1 + 0.1 * now)
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), now - 0.5 * second, dtype=torch.float64))
