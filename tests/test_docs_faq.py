"""Each message of docs/reference/faq.md is provoked, and is printed as it stands there."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import config, pretrain
from jobs.config import compose_job
from jobs.planned import planned
from jobs.run import run_job
from sweeps import __main__ as looking
from sweeps import joint_search, predictor_ablation
from sweeps.cli import run
from sweeps.cli.plan import parse, plan
from sweeps.execution.scheduler import STARTS_ALLOWED, next_claim
from sweeps.report.aggregate import rows
from sweeps.spec.sweep import ScaleName, SweepSpec, build_trials
from sweeps.state import claims
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.damaged import finished
from tests.support.documented import matches, messages
from tests.support.images import image_tree, picture
from tests.support.tiny import OVERRIDES, tiny_config
from tests.support.tiny_sweep import sweep


class Scene:
    """Where a message is provoked: a folder of its own, and what is printed there."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.path, self.patch, self.capture = path, patch, capture
        patch.chdir(path)

    def door(self, main: Callable[[], int | None], *arguments: str) -> str:
        """What a command of that door prints when it refuses."""
        self.patch.setattr(sys, "argv", ["x", *arguments])
        try:
            status = main()
        except SystemExit as end:
            status = int(end.code or 0)
        assert status == 2
        return self.capture.readouterr().err

    def pretrain(self, *arguments: str) -> str:
        """`python -m jobs.pretrain`, refused."""
        return self.door(pretrain.main, *arguments)

    def sweep(self, spec: SweepSpec, *arguments: str) -> str:
        """`python sweeps/<name>.py`, refused."""
        return self.door(lambda: run.main(spec), *arguments)

    def ablation(self, *arguments: str) -> str:
        """The predictor ablation, refused."""
        return self.sweep(predictor_ablation.SWEEP, *arguments)

    def cause(self, *overrides: str) -> str:
        """Why a small run fails."""
        result = run_job(compose_job([*OVERRIDES, *overrides, f"run_dir={self.path / 'run'}"]))
        assert result is not None
        return result.cause

    def damaged(self, file: str) -> tuple[str, str]:
        """The cause of a trial of which a digit has changed, or what `status` says if that was in the sweep's own file."""
        view = finished(self.path / "s")
        trial = view.sweep.trials[0]
        path = (view.sweep.path if file == "sweep.json" else view.sweep.trial_dir(trial)) / file
        path.write_text(path.read_text().replace("42" if file == "sweep.json" else "0.5", "7"))
        if file == "sweep.json":
            return "", self.door(looking.main, "status", str(view.sweep.path))
        assert View(view.sweep).state(trial) is TrialState.damaged
        return next(row.cause for row in rows(View(view.sweep)) if row.signature == trial.signature), ""

    def abandoned(self, times: int, in_slurm: bool = False) -> str:
        """Why a trial is given up whose owners died so many times."""
        spec, log = sweep(), self.path / "job.log"
        start = SlurmStart("here", "7", 0, "gpu01", 4, str(log), "/nowhere") if in_slurm else None
        made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 1, "local", []), self.path / "tiny")
        made.write()
        me = Process.me()
        gone = Process(me.host, me.boot, me.namespace, me.pid, me.started - 1000)
        with self.patch.context() as patch:
            patch.setattr(Process, "me", staticmethod(lambda: gone))
            for epoch in range(1, times + 1):
                assert claims.claim(made.trial_dir(made.trials[0]), epoch, me.driver if start is None else f"{epoch}", 0, start)
        for path in (log, made.trial_dir(made.trials[0]) / "log" / "train.log"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("resuming\ntorch.OutOfMemoryError: Tried to allocate 2 GiB\n")
        next_claim(View(made), me.driver)
        result = made.run(made.trials[0]).result()
        assert result is not None
        return result.cause


def another_configuration(scene: Scene) -> str:
    """A run folder that holds other epochs."""
    RunFolder(scene.path / "run").prepare(compose_job([*OVERRIDES, "epochs=2"]).train)
    return scene.pretrain(*OVERRIDES, "epochs=3", f"run_dir={scene.path / 'run'}")


def fewer_seeds(scene: Scene) -> str:
    """A sweep of which a trial of the second seed has completed, with one seed."""
    spec, words = sweep(), ["--runs-dir", str(scene.path)]
    made, _ = plan(spec, parse(spec, words))
    made.write()
    made.run(made.trials[-1]).prepare(made.trials[-1].config)
    made.run(made.trials[-1]).write_result(RunResult(RunStatus.completed, metrics={}))
    return scene.sweep(spec, *words, "--seeds", "1")


def other_images(scene: Scene) -> str:
    """A run that has begun on an image less."""
    tree = image_tree(scene.path / "tree", ["cat", "dog"], images=15)
    scene.patch.setenv("XDG_CACHE_HOME", str(scene.path))
    words = [*OVERRIDES, "data=imagefolder", f"data.root={tree}", "data.train_limit=0", "data.image_size=32", "global_batch_size=8"]
    words += ["micro_batch_size=8", f"cluster.runs_dir={scene.path}"]
    looks = iter([False, True])
    run_job(planned(compose_job(words))[0], lambda: next(looks, True))
    picture().save(tree / "train" / "cat" / "new.jpg")
    return scene.pretrain(*words)


def misspelt(scene: Scene) -> str:
    """A profile with a field that does not exist."""
    shutil.copytree(config.CONFIG_DIR, scene.path / "slurm")
    (scene.path / "slurm" / "cluster" / "mine.yaml").write_text("name: mine\nscheduler: slurm\npartitoin: gpu\n")
    scene.patch.setattr(config, "CONFIG_DIR", scene.path / "slurm")
    return scene.ablation("--cluster", "mine")


def without_slurm(scene: Scene) -> str:
    """A machine whose PATH has no squeue."""
    scene.patch.setenv("PATH", str(scene.path))
    return scene.ablation("--cluster", "komondor", "account=abc", f"runs_dir={scene.path}")


def without_device(scene: Scene) -> str:
    """A machine without a CUDA device."""
    scene.patch.setattr(torch.cuda, "is_available", lambda: False)
    return scene.pretrain("device=cuda")


def not_finite(scene: Scene) -> str:
    """A probe that is given features that are no numbers."""
    from cnnjepa.probes import linear
    from cnnjepa.probes.features import Features, ProbeData

    broken = Features(torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="finite") as raised:
        linear.run(ProbeData(broken, broken, None, 2, tiny_config()))
    return f"{type(raised.value).__name__}: {raised.value}"


def not_converged(scene: Scene) -> str:
    """A probe that may take one step."""
    from cnnjepa.probes import linear
    from cnnjepa.probes._logistic import NotConvergedError
    from cnnjepa.probes.features import Features, ProbeData

    config = tiny_config()
    config.probes.linear_max_iterations = 1
    random = torch.Generator().manual_seed(0)
    some = Features(torch.randn(40, 8, generator=random), torch.arange(40) % 4)
    with pytest.raises(NotConvergedError) as raised:
        linear.run(ProbeData(some, some, None, 4, config))
    return f"{type(raised.value).__name__}: {raised.value}"


DRY = ["--cluster", "komondor", "--dry-run"]
# The beginning of a message, and how it is come by.
PROVOKED: dict[str, Callable[[Scene], str]] = {
    "error: lr must be a key": lambda s: s.pretrain("lr=0.001"),
    "error: an override must have the form": lambda s: s.pretrain("+epochs=3"),
    "error: an override must have a value": lambda s: s.pretrain("encoder={name: a(b}"),
    "error: optimizer.warmup_epochs must lie": lambda s: s.pretrain("epochs=5"),
    "error: global_batch_size must be a multiple": lambda s: s.ablation("--cluster", "test_cluster", "--scale", "smoke", "--dry-run"),
    "error: micro_batch_size must be global": lambda s: s.pretrain("method=simclr"),
    "error: encoder.sync_bn must be true": lambda s: s.ablation(*DRY, "method=simclr", "account=abc"),
    "error: data.image_size must be a multiple": lambda s: s.pretrain("encoder.name=resnet50", "data.image_size=100"),
    "error: data.image_size must give": lambda s: s.pretrain("encoder.name=resnet18", "data.image_size=64"),
    "error: encoder.name must be one of": lambda s: s.pretrain("method=ijepa"),
    "error: threads must be left": lambda s: s.pretrain("threads=4"),
    "error: data.root must hold the images": other_images,
    "error: data.root must hold imagenet100": lambda s: s.pretrain("data=imagenet100", "data.root=/data/imagenet", "encoder.name=resnet50"),
    "error: data.mean must hold": lambda s: s.pretrain("data=imagefolder", "data.root=/data", "encoder.name=resnet18", "data.channels=1"),
    "error: global_batch_size must be at most": lambda s: s.pretrain("global_batch_size=2048"),
    "error: the command line must match --help": lambda s: s.ablation("epochs=5", "--seeds"),
    "error: --epochs must be an option": lambda s: s.ablation("--epochs", "5"),
    "error: method.predictor.depth must not be overridden": lambda s: s.ablation("method.predictor.depth=2"),
    "error: --early-stopping=asha must leave": lambda s: s.sweep(joint_search.SWEEP, "--dry-run", "epochs=3"),
    "error: memory_gb_per_trial must fit": lambda s: s.ablation("memory_gb_per_trial=100000"),
    "error: run folder must be empty": another_configuration,
    "error: … must keep": fewer_seeds,
    "error: a sweep folder must hold": lambda s: s.door(looking.main, "status", str(s.path)),
    "error: cluster.account must be given": lambda s: s.ablation(*DRY),
    "error: --cluster komondor must be used": without_slurm,
    "error: slurm/cluster/mine.yaml must hold keys": misspelt,
    "error: --max-gpu-hours must be at least": lambda s: s.ablation(*DRY, "--max-gpu-hours", "100", "account=abc"),
    "error: device must be cpu or auto": without_device,
    "NonFiniteError:": lambda s: s.cause("optimizer.lr=1e30"),
    "CollapsedError:": lambda s: s.cause("probes.at_epochs=[1]", "probes.collapsed_std=50"),
    "its process died": lambda s: s.abandoned(2),
    "10 jobs made no progress": lambda s: s.abandoned(STARTS_ALLOWED, in_slurm=True),
    "damaged: result.json": lambda s: s.damaged("result.json")[0],
    "error: sweep.json must be": lambda s: s.damaged("sweep.json")[1],
    "ValueError: features": not_finite,
    "NotConvergedError: the fit": not_converged,
}


def test_every_message_of_the_page_is_provoked() -> None:
    reported = messages("faq.md")
    assert len(reported) >= 20
    found = {begin: [m for m in reported if m.startswith(begin)] for begin in PROVOKED}
    assert {begin: m for begin, m in found.items() if len(m) != 1} == {}
    assert sorted(reported) == sorted(m[0] for m in found.values())


@pytest.mark.parametrize("begin", PROVOKED)
def test_the_message_is_printed_as_it_stands_there(
    begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [message] = [m for m in messages("faq.md") if m.startswith(begin)]
    printed = PROVOKED[begin](Scene(tmp_path, monkeypatch, capsys))
    assert matches(message, printed), f"{message}\n{printed}"
