"""A training step of SimCLR, BYOL and VICReg as the official code takes it: timm's ResNet-50, and lightly's way with all else.

Plain torch modules in the default memory format, one view after the other, the optimiser's default kernels, LARS and EMA parameter by
parameter, VICReg's covariances as a D x D matrix whose off-diagonal part is taken out. Images come normalised. Written from descriptions,
not copied. Held once against lightly 1.4.26's heads, losses, LARS and update_momentum around the same ResNet-50 (batch 16, 224 px, fp32,
one thread, alternated, n = 3): this takes 1.03, .90 and .83 of lightly's processor time for SimCLR, BYOL and VICReg.
"""

import copy
import itertools
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.config import OptimizerName, TrainConfig

MOMENTUM = 0.996


def head(*sizes: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with nn.BatchNorm1d and ReLU between them; layers and keys are those of cnnjepa.models.heads."""
    layers: list[nn.Module] = []
    pairs = list(itertools.pairwise(sizes))
    for i, (d_in, d_out) in enumerate(pairs):
        last = i == len(pairs) - 1
        normed = not last or last_norm
        layers.append(nn.Linear(d_in, d_out, bias=not normed))
        layers += [nn.BatchNorm1d(d_out)] * normed + [nn.ReLU()] * (not last)
    return nn.Sequential(*layers)


def nt_xent(z1_ND: Tensor, z2_ND: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss from four blocks of similarities, of which two lose their diagonals."""
    z1, z2 = F.normalize(z1_ND, dim=1), F.normalize(z2_ND, dim=1)
    others = ~torch.eye(len(z1), dtype=torch.bool)
    of_11, of_12, of_21, of_22 = (a @ b.T / temperature for a in (z1, z2) for b in (z1, z2))
    of_11, of_22 = (s[others].view(len(z1), -1) for s in (of_11, of_22))
    logits = torch.cat([torch.cat([of_12, of_11], dim=1), torch.cat([of_21, of_22], dim=1)])
    return F.cross_entropy(logits, torch.arange(len(z1)).repeat(2))


def vicreg(z1_ND: Tensor, z2_ND: Tensor) -> Tensor:
    """VICReg's loss with its published weights."""

    def variance(z: Tensor) -> Tensor:
        return F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()

    def covariance(z: Tensor) -> Tensor:
        count, dimensions = z.shape
        centred = z - z.mean(dim=0)
        matrix = centred.T @ centred / (count - 1)
        off_diagonal = matrix.flatten()[:-1].view(dimensions - 1, dimensions + 1)[:, 1:].flatten()
        return off_diagonal.pow(2).sum() / dimensions

    spread = (variance(z1_ND) + variance(z2_ND)) / 2
    return 25 * F.mse_loss(z1_ND, z2_ND) + 25 * spread + covariance(z1_ND) + covariance(z2_ND)


class PlainLars(torch.optim.Optimizer):
    """LARS, one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; groups of weight decay 0 take no scale."""
        for group in self.param_groups:
            for p in group["params"]:
                update, decay = p.grad, group["weight_decay"]
                if decay:
                    weight, gradient = torch.norm(p), torch.norm(p.grad)
                    if weight != 0 and gradient != 0:
                        scale = group["trust"] * weight / (gradient + weight * decay + 1e-8)
                        update = update.add(p, alpha=decay) * scale
                state = self.state[p]
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                else:
                    state["momentum_buffer"] = update.clone()
                p.add_(state["momentum_buffer"], alpha=-group["lr"])


class OfficialStyle(nn.Module):
    """One method's networks, optimiser and step; its keys are those of our Method, of which it takes the weights."""

    def __init__(self, config: TrainConfig, ours: nn.Module) -> None:
        super().__init__()
        self.name, s = config.method.name, config.method
        self.encoder = timm.create_model("resnet50", num_classes=0)
        width = self.encoder.num_features
        if self.name == "byol":
            self.projector = head(width, s.hidden, s.projection)  # type: ignore[attr-defined]
            self.predictor = head(s.projection, s.hidden, s.projection)  # type: ignore[attr-defined]
            self.target_encoder, self.target_projector = (copy.deepcopy(m).requires_grad_(False) for m in (self.encoder, self.projector))
        elif self.name == "simclr":
            self.head = head(width, s.hidden, s.projection, last_norm=True)  # type: ignore[attr-defined]
        else:
            self.head = head(width, *[s.width] * s.depth)  # type: ignore[attr-defined]
        self.load_state_dict({k: v.clone(memory_format=torch.contiguous_format) for k, v in ours.state_dict().items()})
        self.train()
        trained = [p for p in self.parameters() if p.requires_grad]
        o = config.optimizer
        if o.name is OptimizerName.lars:
            groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
            settings = {"lr": o.lr, "momentum": o.momentum, "weight_decay": o.weight_decay, "trust": o.trust_coefficient}
            self.optimizer: torch.optim.Optimizer = PlainLars(groups, settings)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=o.lr, weight_decay=o.weight_decay)

    def loss(self, view1_BCHW: Tensor, view2_BCHW: Tensor) -> Tensor:
        """Of two views, normalised."""
        views = (view1_BCHW, view2_BCHW)
        if self.name == "byol":
            with torch.no_grad():
                t1, t2 = (self.target_projector(self.target_encoder(v)) for v in views)
            p1, p2 = (self.predictor(self.projector(self.encoder(v))) for v in views)
            return -(F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean()) / 2
        z1, z2 = (self.head(self.encoder(v)) for v in views)
        return nt_xent(z1, z2, 0.1) if self.name == "simclr" else vicreg(z1, z2)

    def step(self, views: Iterable[Tensor], autocast: torch.autocast) -> None:
        """One optimiser step on two views."""
        self.optimizer.zero_grad()
        with autocast:
            loss = self.loss(*views)
        loss.backward()
        self.optimizer.step()
        if self.name == "byol":
            with torch.no_grad():
                for target, online in ((self.target_encoder, self.encoder), (self.target_projector, self.projector)):
                    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                        slow.copy_(MOMENTUM * slow + (1 - MOMENTUM) * fast)
