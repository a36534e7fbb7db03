"""Every wrong use is one line with the key, the rule and the value, and exit status 2, before anything starts."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnnjepa.config import EncoderName, method_names, optimizer_presets
from cnnjepa.run.folder import RunFolder
from jobs import pretrain
from sweeps.cli import run
from sweeps.joint_search import SWEEP as JOINT_SEARCH
from sweeps.mask_ratio import SWEEP as MASK_RATIO
from sweeps.predictor_ablation import SWEEP
from sweeps.spec.space import whole
from sweeps.state.folder import Sweep
from tests.support import forked
from tests.support.images import image_tree
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[2]
OK = ["optimizer.warmup_epochs=0"]
TABLE = [
    (["epoch=3"], "epoch must be a key of the configuration; got epoch=3; did you mean epochs?"),
    (["lr=0.1"], "lr must be a key of the configuration; got lr=0.1; did you mean optimizer.lr?"),
    (["foo.bar=1"], "foo must be a key of the configuration; got foo.bar=1"),
    (["+x=1"], "an override must have the form key=value; got +x=1"),
    (["epochs"], "an override must have the form key=value; got epochs"),
    (["data.train_limit=[1"], "an override must have a value that Hydra can read; got data.train_limit=[1"),
    (["optimizer.lr=fast"], "optimizer.lr must be of type float; got fast"),
    (["epochs=1.5"], "epochs must be of type integer; got 1.5"),
    (["precision=fp8"], "precision must be one of fp32, bf16, fp64; got fp8"),
    (["encoder.name=vgg"], f"encoder.name must be one of {', '.join(n.name for n in EncoderName)}; got vgg"),
    (["encoder.name=vit_tiny", "data.image_size=56"], "with method=cnn_jepa; got vit_tiny"),
    (["method=ijepa"], "encoder.name must be one of vit_tiny, vit_small, vit_base with method=ijepa; got resnet_small"),
    (["method=ijepa", "encoder.name=vit_tiny"], "data.image_size must be a multiple of the vit_tiny cell of 14 pixels; got 32"),
    (
        ["method=ijepa", "encoder.name=vit_tiny", "data.image_size=28"],
        "data.image_size must give a grid of at least 3x3 cells for the mask",
    ),
    (["encoder.patch_size=16"], "encoder.patch_size must keep its default, since it applies only to ViTs; got 16"),
    (["method=ijepa", "encoder.name=vit_tiny", "encoder.patch_size=0"], "encoder.patch_size must be at least 1; got 0"),
    (
        ["method=ijepa", "encoder.name=vit_tiny", "encoder.patch_size=8", "method.mask.context_scale_min=0.1"],
        "method.mask.context_scale_min and context_scale_max must satisfy target_scale_max < min <= max <= 1; got 0.1 and 1.0",
    ),
    (
        ["method=ijepa", "encoder.name=vit_tiny", "encoder.patch_size=8", "method.predictor_width=50"],
        "method.predictor_width must be a multiple of 12, for heads and sine positions; got 50",
    ),
    (["method=dino"], f"method must be one of {', '.join(method_names())}; got dino"),
    (["optimizer=sgd"], f"optimizer must be one of {', '.join(sorted(optimizer_presets()))}; got sgd"),
    (
        ["method=simclr", "global_batch_size=64", "micro_batch_size=32"],
        "micro_batch_size must be global_batch_size / ranks = 64 with simclr, whose loss compares the images of the whole batch; got 32",
    ),
    (["method=simclr", "method.temperature=0"], "method.temperature must be positive and finite; got 0.0"),
    (["method=simclr", "method.augment.hue=0.6"], "method.augment.hue must lie in [0, 0.5]; got 0.6"),
    (["method=byol", "method.view2.blur_probability=2"], "method.view2.blur_probability must lie in [0, 1]; got 2.0"),
    (["method=byol", "method.hidden=0"], "method.hidden must be at least 1; got 0"),
    (["method=vicreg", "method.covariance=-1"], "method.covariance must be at least 0 and finite; got -1.0"),
    (["method=supervised", "method.classes=7"], "method.classes must be 0 or 10 with data=digits; got 7"),
    (["method=supervised", "data=imagefolder"], "method.classes must be given, at least 2, with data=imagefolder; got 0"),
    (
        ["method=ijepa", "encoder.name=vit_tiny", "encoder.patch_size=8", "method.mask.target_scale_max=0.84"],
        "method.mask.context_scale_min must leave 2 of the 4x4 cells as context beside a target of method.mask.target_scale_max; got 0.85",
    ),
    (
        ["optimizer=simclr", "optimizer.weight_decay=0"],
        "optimizer.weight_decay must be positive with optimizer.name=lars, which scales only decayed weights; got 0.0",
    ),
    (["method=byol", "encoder.compile=true"], "encoder.compile must be false with any method but cnn_jepa; got True"),
    (["optimizer.trust_coefficient=0"], "optimizer.trust_coefficient must be positive and finite; got 0.0"),
    (["optimizer.momentum=1"], "optimizer.momentum must lie in [0, 1); got 1.0"),
    (
        ["data=cifar"],
        "data must be one of digits, fashion_mnist, imagefolder, imagenet100, imagenet100_kaggle, imagenet1k, images; got cifar",
    ),
    (["cluster=summit"], "cluster must be one of komondor, komondor_test, local, test_cluster; got summit"),
    (["method.mask.mask_ratio=1.5"], "method.mask.mask_ratio must lie in (0, 1); got 1.5"),
    (["method.mask.mask_ratio=0"], "method.mask.mask_ratio must lie in (0, 1); got 0.0"),
    (["data.image_size=30"], "data.image_size must be a multiple of the resnet_small cell of 8 pixels; got 30"),
    (["data.image_size=16"], "data.image_size must give a grid of at least 3x3 cells for the mask; got a 2x2 grid"),
    (["global_batch_size=100"], "global_batch_size must be a multiple of micro_batch_size x ranks, 128 x 1; got 100"),
    (["global_batch_size=2048", "micro_batch_size=128"], "global_batch_size must be at most the 1437 training images; got 2048"),
    (["method.predictor.depth=7"], "method.predictor.depth must lie in [1, 6]; got 7"),
    (["method.predictor.kernel=4"], "method.predictor.kernel must be 3, 5, 7 or 9; got 4"),
    (["method.ema.momentum_start=1.1"], "method.ema.momentum_start must lie in [0, 1]; got 1.1"),
    (["optimizer.warmup_epochs=200"], "optimizer.warmup_epochs must lie in [0, epochs) with epochs=200; got 200.0"),
    (["probes.names=[linear,guess]"], "label_fraction, linear, robustness; got guess"),
    (["data=imagefolder", "encoder.name=resnet18"], "data.root must hold imagefolder as train/<class>/<image>"),
    (["method.mask.block_aspect_max=inf"], "block_aspect_max must satisfy 0 < min <= max < infinity; got 0.75 and inf"),
    (["data.holdout_fraction=0.0005"], "data.holdout_fraction must hold out at least 2 of the 1437 images; got 0.0005"),
    (["data.eval_crop_fraction=0.01"], "data.eval_crop_fraction must lie in [0.1, 1]; got 0.01"),
    (["warnings.rankme=-1"], "warnings.rankme must be at least 0 and finite; got -1.0"),
    (["warnings.rankme_share=1.5"], "warnings.rankme_share must lie in [0, 1]; got 1.5"),
    (["warnings.plateau_share=0"], "warnings.plateau_share must lie in (0, 1]; got 0.0"),
    (["warnings.knn_probes=0"], "warnings.knn_probes must be at least 1; got 0"),
    (["probes.linear_paper_lr=inf"], "probes.linear_paper_lr must be positive and finite; got inf"),
    (["probes.linear_tolerance=0"], "probes.linear_tolerance must lie in [1e-5, 0.05]; got 0.0"),
    (
        ["probes.linear_epochs=5"],
        "probes.linear_epochs must be written probes.linear_paper_epochs; got probes.linear_epochs=5: write probes.linear_paper_epochs=5",
    ),
    (
        ["probes.batch_size=8"],
        "probes.batch_size must be written probes.feature_batch_size; got probes.batch_size=8: write probes.feature_",
    ),
    (["threads=4"], "threads must be left to cluster.cores_per_trial; got threads=4"),
    (
        ["encoder.name=resnet50", "encoder.width=64", "data.image_size=96"],
        "encoder.width must keep its default, since it applies only to resnet_small; got 64",
    ),
    (
        ["method.predictor.conv=pointwise", "method.predictor.kernel=5"],
        "method.predictor.kernel must keep its default with conv=pointwise; got 5",
    ),
    (["cluster.max_parallel=-1"], "cluster.max_parallel must be at least 0; got -1"),
    (["cluster.gpus_per_trial=2"], "cluster.gpus_per_trial must lie in [0, 1]; got 2.0"),
    (["cluster.memory_gb_per_trial=0"], "cluster.memory_gb_per_trial must be at least 0.01 and finite; got 0.0"),
    (["run_dir=/proc/none"], "run_dir must be a folder that can be written; got /proc/none"),
]


def call_pretrain(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    return pretrain.main()


@pytest.mark.parametrize(("arguments", "message"), TABLE, ids=[" ".join(a) for a, _ in TABLE])
def test_pretrain_says_what_is_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {a.split("=")[0] for a in arguments}
    defaults = [o for o in (*OK, f"run_dir={tmp_path / 'run'}") if o.split("=")[0] not in keys]
    assert call_pretrain([*defaults, *arguments], monkeypatch) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_folder_of_another_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    RunFolder(tmp_path).prepare(tiny_config())
    assert call_pretrain([*OK, f"run_dir={tmp_path}"], monkeypatch) == 2
    assert "run folder must be empty or hold the same configuration" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_and_leaves_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call_pretrain([*OK, "device=cuda", f"run_dir={tmp_path / 'run'}"], monkeypatch) == 2
    assert "device must be cpu or auto where torch sees no CUDA device; got cuda" in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").result() is None


@pytest.mark.parametrize("text", ["", "seed: 42", "][", "- 1"])
def test_a_config_that_no_run_wrote_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert call_pretrain([*OK, f"run_dir={tmp_path}"], monkeypatch) == 2
    assert "config.yaml must be a file that a run wrote" in capsys.readouterr().err


def test_classes_that_no_probe_can_serve_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tree = image_tree(tmp_path / "tree", ["cat"], images=20)
    assert call_pretrain([*OK, "data=imagefolder", f"data.root={tree}", f"run_dir={tmp_path / 'run'}"], monkeypatch) == 2
    assert "data.imagefolder must have at least 2 classes in its training images for the probes; got 1" in capsys.readouterr().err


def test_ranks_that_do_not_divide_the_batch_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert call_pretrain(OK, monkeypatch) == 2
    assert "micro_batch_size x ranks, 128 x 3; got 512" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert call_pretrain([*OK, "global_batch_size=4", "micro_batch_size=4"], monkeypatch) == 2
    assert "global_batch_size must be at least the number of ranks, 8; got 4" in capsys.readouterr().err


ON_SLURM = ["micro_batch_size=16", "--cluster=test_cluster", "--scale=smoke"]
ALLOCATION = [*ON_SLURM, "--backend=allocation"]
SWEEP_TABLE = [
    (["--cluster", "summit"], "cluster must be one of komondor, komondor_test, local, test_cluster; got summit"),
    (["--seeds", "0"], "--seeds must be at least 1; got 0"),
    (
        ["--prune-on", "rankme"],
        "probes.every_epochs or probes.at_epochs must give a probe before epoch 8 to prune on rankme, which is checked at probes; "
        "got none: add 'probes.at_epochs=[4]'",
    ),
    (["--prune-on", "loss", "probes.at_epochs=[8]"], "must give a probe before epoch 8 to prune on loss"),
    (["--prune-on", "luck"], "--prune-on must be one of feature_std, rankme, knn, loss; got luck"),
    (["--runs-dir", "/proc/none"], "--runs-dir must be a folder that can be written; got /proc/none"),
    (["method.predictor.depth=2"], "method.predictor.depth must not be overridden, because predictor_ablation sets it"),
    (["run_dir=x"], "run_dir must not be overridden"),
    (["cluster.memory_gb_per_trial=100000"], "memory_gb_per_trial must fit this machine at least once"),
    (["seed=3"], "seed must not be overridden"),
    (["epoch=3"], "epoch must be a key of the configuration; got epoch=3; did you mean epochs?"),
    (["--scale", "paper"], "data.root must hold imagenet100_kaggle"),
    (
        ["--backend", "allocation"],
        "--backend must be left out on this machine, where Ray Tune places the trials; got allocation: give a Slurm --cluster",
    ),
    (["--nodes", "2"], "--nodes must come with --backend allocation on a Slurm cluster; got 2: add it, or leave --nodes out"),
    ([*ON_SLURM, "--nodes", "2"], "--nodes must come with --backend allocation on a Slurm cluster; got 2"),
    ([*ON_SLURM, "--trials-per-node", "4"], "--trials-per-node must come with --backend allocation on a Slurm cluster; got 4"),
    (ALLOCATION, "--nodes must be given with --backend allocation; got none: add --nodes N"),
    ([*ALLOCATION, "--nodes", "0"], "--nodes must be at least 1; got 0"),
    ([*ALLOCATION, "--nodes", "1", "--trials-per-node", "0"], "--trials-per-node must lie in [1, 4], the cores of a node; got 0"),
    ([*ALLOCATION, "--nodes", "1", "--trials-per-node", "8"], "--trials-per-node must lie in [1, 4], the cores of a node; got 8"),
    (
        [*ALLOCATION, "--nodes", "1", "--trials-per-node", "2"],
        "--trials-per-node must be a multiple of the 4 GPUs of a node, since a trial uses at most one GPU; got 2: for several GPUs",
    ),
    (
        ["cores_per_trial=8", *ALLOCATION, "--nodes", "1", "--trials-per-node", "6"],
        "--trials-per-node must be a multiple of the 4 GPUs of a node",
    ),
]


SEARCH_TABLE = [
    (["--max-trials", "0"], "--max-trials must be at least 1; got 0"),
    (["--eta", "1"], "--eta must be at least 2; got 1"),
    (["--prune-on", "knn", "probes.names=[linear]"], "probes.names must hold knn to prune on knn; got linear"),
    (["--sampler", "grid", "--max-trials", "3"], "--max-trials must be left out with --sampler grid, which runs every combination; got 3"),
    (["--sampler", "grid", "--two-objectives"], "--two-objectives must be left out with --sampler grid"),
    (["--sampler", "multi_fidelity", "--two-objectives"], "--sampler must be tpe, random or gp with --two-objectives"),
    (["--two-objectives", "--early-stopping", "asha"], "--early-stopping must be none with --two-objectives"),
    (["--budget-gpu-hours", "0"], "--budget-gpu-hours must be positive and finite; got 0"),
    (["--budget-gpu-hours", "nan"], "--budget-gpu-hours must be positive and finite; got nan"),
    (["method.predictor.depth=2"], "method.predictor.depth must not be overridden, because joint_search sets it"),
    (["optimizer.lr=2"], "optimizer.lr must not be overridden, because joint_search sets it"),
    (["epochs=2"], "--early-stopping=asha must leave an epoch between the warm-up of 1 and 2 / 4; got none: use more epochs"),
    (["epochs=200", "optimizer.warmup_epochs=90"], "--early-stopping=asha must leave an epoch between the warm-up of 90 and 200 / 4"),
]


@pytest.mark.parametrize(("arguments", "message"), SEARCH_TABLE, ids=[" ".join(a) for a, _ in SEARCH_TABLE])
def test_a_search_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        run.run(JOINT_SEARCH, ["--runs-dir", str(tmp_path), *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_space_whose_border_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    deep = dataclasses.replace(JOINT_SEARCH, space=[whole("method.predictor.depth", 1, 9)])
    with pytest.raises(ValueError, match=r"method\.predictor\.depth must lie in \[1, 6\]; got 9"):
        run.run(deep, ["--runs-dir", str(tmp_path)])


@pytest.mark.parametrize(("arguments", "message"), SWEEP_TABLE, ids=[" ".join(a) for a, _ in SWEEP_TABLE])
def test_a_sweep_says_what_is_wrong(arguments: list[str], message: str, tmp_path: Path) -> None:
    runs = [] if "--runs-dir" in arguments else ["--runs-dir", str(tmp_path)]
    with pytest.raises(ValueError, match="must") as caught:
        run.run(SWEEP, [*runs, *arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


def test_a_search_over_keys_that_the_method_lacks_says_so(tmp_path: Path) -> None:
    line = ["--runs-dir", str(tmp_path), "method=simclr", "--dry-run"]
    with pytest.raises(
        ValueError, match=r"^the configuration must have method\.mask\.strategy; got one without it: the key may belong to another"
    ):
        run.run(MASK_RATIO, line)


def test_a_sweep_takes_a_batch_that_fits_its_own_scale(tmp_path: Path) -> None:
    assert run.run(SWEEP, ["--runs-dir", str(tmp_path), "global_batch_size=192", "--dry-run"]) == 0


def test_a_sweep_file_that_no_sweep_wrote_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"trials": []}')
    with pytest.raises(ValueError, match=r"sweep\.json must be a file that this project wrote"):
        Sweep.load(tmp_path)


AS_PROCESSES = [
    ["-m", "jobs.pretrain", "epoch=3"],
    [str(ROOT / "sweeps" / "predictor_ablation.py"), "epoch=3"],
    ["-m", "sweeps", "status", "nowhere"],
    ["-m", "jobs.export", "nowhere"],
    ["-m", "jobs.probe", "nowhere"],
]
FORKED = [
    ["-m", "jobs.pretrain", "-m", "optimizer.lr=0.1,fast"],
    ["-m", "jobs.pretrain", "-m", "epochs=[1"],
    ["-m", "jobs.pretrain", "-m", "optimizer.warmup_epochs=0", "data=digits,imagefolder", "cluster.runs_dir=runs"],
]


@pytest.mark.slow
@pytest.mark.parametrize("command_line", AS_PROCESSES + FORKED, ids=lambda line: " ".join(line).replace(f"{ROOT}/", ""))
def test_as_a_process_it_exits_2_with_one_line(command_line: list[str], tmp_path: Path) -> None:
    if command_line in FORKED:
        done = forked.run(command_line, cwd=tmp_path)
    else:
        done = subprocess.run([sys.executable, *command_line], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
