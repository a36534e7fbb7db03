"""The trainer against a plain loop that has its own formulas: it must take the same steps, and not only the same ones as yesterday.

From the package the loop takes the networks, whose figures test_parity.py holds against the official code. Schedules, AdamW, EMA,
accumulation, masks, order, crops, augmentations, normalisation and losses are written here, from what the documentation says of them.

The golden file holds what both came to. To write it again: python tests/cnnjepa/test_reference.py
"""

import hashlib
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from cnnjepa import train as trainer
from cnnjepa.config import AugmentConfig, EmaConfig, EncoderConfig, Execution, OptimizerConfig, Precision, Schedule, TrainConfig
from cnnjepa.data import datasets
from cnnjepa.mask_config import MaskConfig
from cnnjepa.methods import _masked, byol, cnn_jepa
from cnnjepa.models.masked import Visibility
from cnnjepa.optim import AdamW
from cnnjepa.run.folder import RunFolder
from tests.support.tiny import tiny_config

GOLDEN = Path(__file__).with_name("reference_steps.json")
SEED, IMAGES, GLOBAL_BATCH, MICRO_BATCH, EPOCHS, SIZE, GRID = 7, 70, 16, 8, 2, 40, 5
STEPS_PER_EPOCH = 4  # 6 of the 70 images are left over in each epoch
STEPS = EPOCHS * STEPS_PER_EPOCH
LR, FINAL_LR, WARMUP_STEPS = 0.004, 0.1, 3  # the warm-up ends within the first epoch
DECAY, FINAL_DECAY = 0.3, 4.0
BETA1, BETA2, EPSILON = 0.8, 0.95, 1e-8
# Both strategies come up in these 8 steps.
MASK = MaskConfig(multi_block_probability=0.5, mask_ratio=0.55, blocks=3)
VIEW1 = AugmentConfig(min_crop_scale=0.4, jitter_probability=0.8, hue=0.2, grey_probability=0.3, blur_probability=0.9)
VIEW2 = AugmentConfig(min_crop_scale=0.2, jitter_probability=0.5, saturation=0.6, blur_probability=0.2, solarise_probability=0.6)
METHODS = {
    "cnn_jepa": cnn_jepa.Config(mask=MASK, ema=EmaConfig(0.9, 0.99, Schedule.linear)),
    "byol": byol.Config(view1=VIEW1, view2=VIEW2, hidden=24, projection=12, ema=EmaConfig(0.8, 0.98, Schedule.cosine)),
}
# The numbers of the streams, as cnnjepa/randomness.py lists them: a run's randomness is a function of (seed, stream, key).
ORDER, MASKS, VIEWS = 1, 2, 3


def config_of(method: str) -> TrainConfig:
    config = tiny_config(
        method=METHODS[method],
        encoder=EncoderConfig(width=4),
        seed=SEED,
        epochs=EPOCHS,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        precision=Precision.fp64,
        optimizer=OptimizerConfig(
            lr=LR,
            weight_decay=DECAY,
            beta1=BETA1,
            beta2=BETA2,
            warmup_epochs=WARMUP_STEPS / STEPS_PER_EPOCH,
            final_lr_fraction=FINAL_LR,
            final_weight_decay_fraction=FINAL_DECAY,
            decay_norms_and_biases=method == "cnn_jepa",
        ),
    )
    config.data = replace(config.data, image_size=SIZE, train_limit=IMAGES, test_limit=10, flip_probability=0.4)
    config.probes.names, config.checkpoint.every_minutes = ["collapse"], 60
    return config


@dataclass
class Step:
    """What one optimiser step was made of, and what it came to."""

    loss: float = 0.0
    lr: float = 0.0
    decay: float = 0.0  # of the group that is decayed
    momentum: float = 0.0  # of the target
    gradient_norm: float = 0.0
    visible_fraction: float = 1.0
    order: list[int] = field(default_factory=list)  # numbers of the images, in the order of the global batch
    pixels: list[Tensor] = field(default_factory=list)  # uint8, a micro-batch and view
    masks: list[np.ndarray] = field(default_factory=list)  # a micro-batch
    state: dict[str, Tensor] = field(default_factory=dict)  # of the whole method, after the step and the target's move

    def target_norm(self) -> float:
        """Over the target's weights, running statistics left out."""
        weights = [v for k, v in self.state.items() if k.startswith("target_") and "running_" not in k and "tracked" not in k]
        return math.sqrt(sum(float(w.square().sum()) for w in weights))

    def golden(self) -> dict[str, Any]:
        return {
            **{k: getattr(self, k) for k in ("loss", "lr", "decay", "momentum", "gradient_norm", "visible_fraction", "order")},
            "target_norm": self.target_norm(),
            "pixels": digest(*(p.contiguous().numpy() for p in self.pixels)),
            "masks": digest(*self.masks),
        }


def digest(*arrays: np.ndarray) -> str:
    text = hashlib.sha256()
    for array in arrays:
        text.update(str(array.shape).encode() + np.ascontiguousarray(array, dtype=np.uint8).tobytes())
    return text.hexdigest()[:16]


# ----- the plain loop -----


def numbers(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def lr_of(step: int) -> float:
    """Linear up to LR, whose first step is not 0; then half a cosine down to FINAL_LR x LR at the last step."""
    if step < WARMUP_STEPS:
        return LR * (step + 1) / WARMUP_STEPS
    angle = math.pi * (step - WARMUP_STEPS) / (STEPS - 1 - WARMUP_STEPS)
    return LR * (FINAL_LR + (1 - FINAL_LR) * (0.5 + 0.5 * math.cos(angle)))


def decay_of(step: int) -> float:
    """Half a cosine from DECAY at the first step to FINAL_DECAY x DECAY at the last."""
    return DECAY * (1 + (FINAL_DECAY - 1) * (0.5 - 0.5 * math.cos(math.pi * step / (STEPS - 1))))


def momentum_of(method: str, step: int) -> float:
    """Of the 0-based step: linear from 0.9 to 0.99 (cnn_jepa), half a cosine from 0.8 to 0.98 (byol)."""
    share = step / (STEPS - 1)
    return 0.9 + 0.09 * share if method == "cnn_jepa" else 0.8 + 0.18 * (0.5 - 0.5 * math.cos(math.pi * share))


def masks_of(step: int) -> np.ndarray:
    """The masks of the global batch, True where visible: one draw a step chooses the strategy, a row of draws belongs to a position."""
    random = numbers(SEED, MASKS, step)
    strategy, scale, aspect = random.random(3)
    visible = np.ones((GLOBAL_BATCH, GRID, GRID), bool)
    if strategy >= 0.5:
        for sample, noise in zip(visible, random.random((GLOBAL_BATCH, GRID * GRID)), strict=True):
            sample.reshape(-1)[np.argsort(noise)[11:]] = False  # 11 of 25 cells stay: 45 %
        return visible
    area = int((0.15 + 0.05 * scale) * GRID * GRID)
    height, width = round(math.sqrt(area * (0.75 + 0.75 * aspect))), round(math.sqrt(area / (0.75 + 0.75 * aspect)))
    for sample, corners in zip(visible, random.random((GLOBAL_BATCH, 3, 2)), strict=True):
        for down, right in corners:
            top, left = int(down * (GRID - height + 1)), int(right * (GRID - width + 1))
            sample[top : top + height, left : left + width] = False
        assert sample.any(), "blocks that hide all are another rule's"
    return visible


def augmented(view: Image.Image, augment: AugmentConfig, random: np.random.Generator) -> Image.Image:
    """Jitter, grey, blur and solarisation: four draws decide, then each that is wanted draws its own."""
    from torchvision.transforms.v2 import functional as TF

    jitter, grey, blur, solarise = random.random(4)
    if jitter < augment.jitter_probability:
        factors = [random.uniform(1 - s, 1 + s) for s in (augment.brightness, augment.contrast, augment.saturation)]
        factors.append(random.uniform(-augment.hue, augment.hue))
        changes = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
        for i in random.permutation(4):
            view = changes[i](view, factors[i])
    if grey < augment.grey_probability:
        view = Image.merge("RGB", [view.convert("L")] * 3)
    if blur < augment.blur_probability:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0) * SIZE / 224))
    if solarise < augment.solarise_probability:
        view = view.point(lambda value: 255 - value if value >= 128 else value)
    return view


def view_of(image_HW: np.ndarray, random: np.random.Generator, least: float, augment: AugmentConfig | None) -> Tensor:
    """One view, uint8 [3, SIZE, SIZE]: a crop of random area and aspect, mirrored in 4 of 10 cases, and perhaps augmented."""
    full_height, full_width = image_HW.shape
    while True:
        area = full_height * full_width * random.uniform(least, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= full_width and height <= full_height:
            break
    top = int(random.integers(0, full_height - height + 1))
    left = int(random.integers(0, full_width - width + 1))
    crop = np.stack([image_HW[top : top + height, left : left + width]] * 3, axis=2)
    pixels = F.interpolate(torch.from_numpy(crop).permute(2, 0, 1)[None], (SIZE, SIZE), mode="bicubic", antialias=True)[0]
    if random.random() < 0.4:
        pixels = pixels.flip(2)
    if augment is None:
        return pixels
    changed = augmented(Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())), augment, random)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def losses_of(method: str, net: Any, views: list[Tensor], visible: np.ndarray) -> Tensor:
    """The loss of one micro-batch, from the method's networks; the running statistics of theirs move."""
    if method == "cnn_jepa":
        image, mask = views[0], torch.from_numpy(visible)
        with torch.no_grad():
            target = net.target_encoder(image)
        context = net.encoder(image, Visibility(mask))
        prediction = net.predictor(torch.where(mask[:, None], context, net.mask_token))
        a, b = (x.permute(0, 2, 3, 1)[~mask] for x in (prediction, target))
        # A network whose last layer is a ReLU and gives nothing but zeros at a cell has no direction there: torch's convention is 0.
        a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (a, b))
        return ((a - b) ** 2 / 2).sum(1).mean()
    p1, p2 = (net.predictor(net.projector(net.encoder(view).mean((2, 3)))) for view in views)
    with torch.no_grad():
        t1, t2 = (net.target_projector(net.target_encoder(view).mean((2, 3))) for view in views)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()

    return -(cosine(p1, t2) + cosine(p2, t1)).mean() / 2


def reference(method: str) -> list[Step]:
    """The run of `config_of(method)`, step by step."""
    config = config_of(method)
    config.encoder.execution = Execution.masked  # the way that is easy to read; the trainer takes the fast one
    splits = datasets.load_splits(config.data)
    images = splits.dataset.train.pixels  # type: ignore[attr-defined]
    net = sys.modules[f"cnnjepa.methods.{method}"].Method(config, STEPS).double().train()
    trained = {name: p for name, p in net.named_parameters() if not name.startswith("target_")}
    firsts, seconds = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
    specs = [(0.5, None)] if method == "cnn_jepa" else [(0.4, VIEW1), (0.2, VIEW2)]
    steps = []
    for step in range(STEPS):
        epoch, in_epoch = divmod(step, STEPS_PER_EPOCH)
        permutation = numbers(SEED, ORDER, epoch).permutation(IMAGES)
        chosen = splits.pretrain[permutation[in_epoch * GLOBAL_BATCH : (in_epoch + 1) * GLOBAL_BATCH]]
        out = Step(lr=lr_of(step), decay=decay_of(step), momentum=momentum_of(method, step), order=chosen.tolist())
        masks = masks_of(step)
        for p in trained.values():
            p.grad = None
        total = torch.zeros((), dtype=torch.float64)
        for start in (0, MICRO_BATCH):
            part = slice(start, start + MICRO_BATCH)
            views = [
                torch.stack([view_of(images[i], numbers(SEED, VIEWS, epoch, i, v), *spec) for i in out.order[part]])
                for v, spec in enumerate(specs)
            ]
            out.pixels += views
            if method == "cnn_jepa":
                out.masks.append(masks[part])
            normalised = [(view.double() / 255 - 0.305) / 0.349 for view in views]
            total = total + losses_of(method, net, normalised, masks[part]) / 2
        total.backward()
        out.loss = total.item()
        out.gradient_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.values() if p.grad is not None))
        if out.masks:
            out.visible_fraction = float(np.mean(out.masks))
        with torch.no_grad():
            for name, p in trained.items():
                assert p.grad is not None
                firsts[name] = BETA1 * firsts[name] + (1 - BETA1) * p.grad
                seconds[name] = BETA2 * seconds[name] + (1 - BETA2) * p.grad**2
                mean, square = firsts[name] / (1 - BETA1 ** (step + 1)), seconds[name] / (1 - BETA2 ** (step + 1))
                decay = out.decay if method == "cnn_jepa" or p.ndim > 1 else 0.0
                p.copy_(p - out.lr * decay * p - out.lr * mean / (square.sqrt() + EPSILON))
            for name, p in net.named_parameters():
                if name.startswith("target_"):
                    p.copy_(out.momentum * p + (1 - out.momentum) * trained[name.removeprefix("target_")])
        out.state = {k: v.clone() for k, v in net.state_dict().items()}
        steps.append(out)
    return steps


# ----- the trainer, watched -----


def trained(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """What `cnnjepa.train.train` did at each step: seen from outside, and from its records."""
    steps = [Step() for _ in range(STEPS)]
    seen = {"images": 0, "loaded": 0, "masks": 0, "steps": 0, "moves": 0}

    def step_of(what: str, per_step: int) -> Step:
        number = seen[what] // per_step
        seen[what] += 1
        return steps[number] if number < STEPS else Step()

    def pictures(self: datasets.GreyImages, indices: list[int]) -> Any:
        step_of("images", 2).order += indices
        return honest_pictures(self, indices)

    def micro_batch(run: Any, loaded: Any, micro_step: int, shown: Any = None) -> Any:
        step_of("loaded", 2).pixels += loaded[0]
        return honest_batch(run, loaded, micro_step, shown)

    def draw_visible(*key: Any) -> np.ndarray:
        drawn = honest_draw(*key)
        step_of("masks", 2).masks.append(drawn)
        return drawn

    def take_step(self: AdamW, closure: None = None) -> None:
        step = step_of("steps", 1)
        step.lr, step.decay = (self.param_groups[0][k] for k in ("lr", "weight_decay"))
        assert {g["lr"] for g in self.param_groups} == {step.lr}
        honest_step(self)

    def after_step(self: Any, number: int) -> dict[str, Any]:
        golden = honest_move(self, number)
        step_of("moves", 1).state = {k: v.clone() for k, v in self.state_dict().items()}
        return golden

    module = sys.modules[f"cnnjepa.methods.{method}"]
    honest_pictures, honest_batch = datasets.GreyImages.pictures, trainer.micro_batch
    honest_draw, honest_step, honest_move = _masked.draw_visible, AdamW.step, module.Method.after_step
    with monkeypatch.context() as patch:
        patch.setattr(datasets.GreyImages, "pictures", pictures)
        patch.setattr(trainer, "micro_batch", micro_batch)
        patch.setattr(_masked, "draw_visible", draw_visible)
        patch.setattr(AdamW, "step", take_step)
        patch.setattr(module.Method, "after_step", after_step)
        run, config = RunFolder(folder), config_of(method)
        run.prepare(config)
        assert trainer.train(config, run) is not None
    records = [r for r in run.metrics() if r["kind"] == "step"]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["epoch"] for r in records] == [(s + 1) / STEPS_PER_EPOCH for s in range(STEPS)]
    for step, record in zip(steps, records, strict=True):
        step.loss, step.momentum, step.gradient_norm = record["loss"], record["ema_momentum"], record["gradient_norm"]
        step.visible_fraction = record["visible_fraction"]
        assert record["lr"] == step.lr, "what is recorded is what the optimiser was given"
    assert (seen["loaded"], seen["steps"], seen["moves"]) == (2 * STEPS, STEPS, STEPS)
    return steps


@pytest.mark.parametrize("method", list(METHODS))
def test_the_trainer_takes_the_steps_of_a_plain_loop(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = reference(method), trained(method, tmp_path, monkeypatch)
    for number, (expected, step) in enumerate(zip(ours, theirs, strict=True)):
        where = f"{method}, step {number}"
        assert step.order == expected.order, where
        assert len(step.pixels) == len(expected.pixels), where
        assert all(torch.equal(a, b) for a, b in zip(step.pixels, expected.pixels, strict=True)), where
        assert len(step.masks) == len(expected.masks), where
        assert all(np.array_equal(a, b) for a, b in zip(step.masks, expected.masks, strict=True)), where
        for name in ("lr", "decay", "momentum", "visible_fraction"):
            assert getattr(step, name) == pytest.approx(getattr(expected, name), rel=1e-12), f"{where}: {name}"
        for name in ("loss", "gradient_norm"):
            assert getattr(step, name) == pytest.approx(getattr(expected, name), rel=1e-9), f"{where}: {name}"
        assert step.state.keys() == expected.state.keys()
        for name, value in expected.state.items():
            torch.testing.assert_close(step.state[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, at=f"{where}: {name}": f"{at}: {m}")
    golden = json.loads(GOLDEN.read_text())[method]
    assert len(golden) == STEPS
    for number, (held, step) in enumerate(zip(golden, theirs, strict=True)):
        ours = step.golden()
        assert held.keys() == ours.keys()
        for name, value in held.items():
            assert ours[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), f"{method}, step {number}: {name}"


def test_the_run_that_is_compared_has_no_value_at_which_a_fault_would_hide() -> None:
    """Both mask strategies, mirrored and unmirrored views, two orders, and schedules that differ at each step."""
    counts = {int(masks_of(step).sum(axis=(1, 2)).std() > 0) for step in range(STEPS)}
    assert counts == {0, 1}  # a random mask leaves as many cells to each sample, blocks overlap more or less
    assert len({masks_of(step).tobytes() for step in range(STEPS)}) == STEPS
    assert (numbers(SEED, ORDER, 0).permutation(IMAGES) != numbers(SEED, ORDER, 1).permutation(IMAGES)).any()
    assert len({lr_of(step) for step in range(STEPS)}) == STEPS - 1  # the warm-up's last is the cosine's first
    for of in (decay_of, lambda s: momentum_of("byol", s), lambda s: momentum_of("cnn_jepa", s)):
        assert len({of(step) for step in range(STEPS)}) == STEPS


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = {}
    for chosen in METHODS:
        with tempfile.TemporaryDirectory() as place:
            golden[chosen] = [step.golden() for step in trained(chosen, Path(place), pytest.MonkeyPatch())]
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
