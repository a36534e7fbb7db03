"""Each command of README.md and docs/ is typed in a copy of the checkout, or run by another test, or marked as needing a cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documented import MARKS, ROOT, Command, commands, typed, typed_by
from tests.support.slurm_bench import needs_slurm
from tests.support.tiny import OVERRIDES
from tests.support.typed import EXAMPLES, Run, Session

_FEW_STEPS = [word for word in OVERRIDES if not word.startswith(("checkpoint.", "log."))]
_SHORT = " ".join([*_FEW_STEPS, "epochs=2", "optimizer.warmup_epochs=1", "micro_batch_size=32"])
_ABLATION, _DEPTH, _RATE = (f"runs/{name}-smoke" for name in ("predictor_ablation", "predictor_depth", "rate_and_depth"))
_SINGLE = "optimizer.warmup_epochs=1 global_batch_size"

_RUN_ABLATION = "python sweeps/predictor_ablation.py --cluster local"
_RUN_DEPTH, _RUN_RATE = (f"python sweeps/{name}.py --cluster local" for name in ("predictor_depth", "rate_and_depth"))
_RUN_SINGLE = f"python -m jobs.pretrain data=digits epochs=10 {_SINGLE}=64 micro_batch_size=64"
_RUN_STABLE = "python -m jobs.pretrain data=digits epochs=10 optimizer.schedule=wsd optimizer.warmup_epochs=1 run_dir=runs/short"
_START_SLURM = "python tests/support/slurm_cluster.py start /tmp/ms"
_PACK = "python -m cnnjepa.data.pack /data/imagenet /scratch/in100 --classes imagenet100 --verify"

# In any order: a command names those whose work it looks at, and they are typed before it.
TYPED = {
    ". .venv/bin/activate": Run("bin/python"),
    _RUN_ABLATION: Run("linear top-1, test", f"--name {Path(_ABLATION).name} --seeds 1", _SHORT, starts_others=True),
    "python sweeps/predictor_ablation.py --cluster local --dry-run": Run("11 trials, 2 epochs each", "--seeds 1", _SHORT),
    "python sweeps/predictor_ablation.py --cluster local --runs-dir elsewhere": Run("epochs each, in ", "--dry-run"),
    "python sweeps/predictor_ablation.py --cluster local --seeds 5 epochs=20": Run("55 trials, 20 epochs each", "--dry-run"),
    "python sweeps/predictor_ablation.py --cluster local epochs=20": Run("/predictor_ablation-smoke-epochs20", "--dry-run"),
    "python sweeps/predictor_ablation.py --cluster local epochs=20 --name long": Run("20 epochs each, in ", "--dry-run"),
    "python -m sweeps list runs": Run("11 completed", after=(_RUN_ABLATION,)),
    f"python -m sweeps compare {_ABLATION} {_ABLATION}-epochs20": Run("code: the code is the same", after=(_RUN_ABLATION, _RUN_DEPTH)),
    f"python -m sweeps status {_ABLATION}": Run("11 completed of 11 trials", after=(_RUN_ABLATION,)),
    f"python -m sweeps nodes {_ABLATION}": Run("no node is avoided", after=(_RUN_ABLATION,)),
    f"python -m sweeps results {_ABLATION} --format markdown": Run("| configuration |", after=(_RUN_ABLATION,)),
    f"python -m sweeps report {_ABLATION}": Run("report.html", after=(_RUN_ABLATION,)),
    f"tensorboard --logdir {_ABLATION}/tensorboard": Run("These tags are in", "--inspect", after=(_RUN_ABLATION,)),
    "python sweeps/predictor_ablation.py --cluster local --seeds 5": Run("55 trials, 8 epochs each", "--dry-run"),
    f"python -m sweeps cancel {_ABLATION} 3": Run("0 trials cancelled", after=(_RUN_ABLATION,)),
    f"python -m sweeps cancel {_ABLATION}": Run("0 trials cancelled", after=(_RUN_ABLATION,)),
    f"python -m sweeps logs --no-follow {_ABLATION} 3": Run("step 10/10", after=(_RUN_ABLATION,)),
    f"python -m sweeps show {_ABLATION} 7": Run("attempts\n  1: ", after=(_RUN_ABLATION,)),
    f"python -m jobs.pretrain -m --like {_ABLATION}/3 optimizer.lr=0.003,0.03": Run(
        "optimizer.lr: 0.01 -> 0.03", "", after=(_RUN_ABLATION,), starts_others=True
    ),
    f"python -m jobs.export {_ABLATION}/3": Run("backbone.safetensors: target backbone after", after=(_RUN_ABLATION,)),
    f"python -m sweeps show {_ABLATION} 3": Run("to run it alone", after=(_RUN_ABLATION,)),
    f"python -m sweeps show {_ABLATION} 3 0": Run("method.predictor.depth: 1 -> 4", after=(_RUN_ABLATION,)),
    f"python -m jobs.pretrain --weights-from {_ABLATION}/3 epochs=16": Run(
        "tensors of the encoder", "", "epochs=3", after=(_RUN_ABLATION,)
    ),
    f"python -m jobs.pretrain --like {_ABLATION}/3 epochs=16": Run("epochs: 2 -> 3", "", "epochs=3", after=(_RUN_ABLATION,)),
    "python sweeps/joint_search.py --cluster local": Run("multi_fidelity chooses up to 16 configurations", "--dry-run"),
    "python sweeps/predictor_ablation.py --cluster komondor --scale paper --seeds 3 --dry-run account=abc": Run(
        "33 runs, 6633 epochs to train"
    ),
    "python sweeps/method_comparison.py --cluster local": Run("27 trials", "--dry-run"),
    "python sweeps/method_comparison.py --cluster komondor --dry-run account=abc": Run("30 trials"),
    f"python -m jobs.pretrain method=simsiam data=digits epochs=10 {_SINGLE}=64 micro_batch_size=64": Run("completed: ", "", _SHORT),
    "python -m pytest tests/cnnjepa/methods/test_methods.py -k simsiam": Run("8 passed", "-q -p no:xdist", starts_others=True),
    "python sweeps/predictor_ablation.py --cluster komondor --dry-run account=abc": Run("#SBATCH --account=abc"),
    f"python -m sweeps logs --no-follow {_ABLATION} 0": Run("step 10/10", after=(_RUN_ABLATION,)),
    f"python -m sweeps cancel {_ABLATION} 0": Run("0 trials cancelled", after=(_RUN_ABLATION,)),
    f"python -m sweeps results {_ABLATION}": Run("linear top-1, test", after=(_RUN_ABLATION,)),
    "python sweeps/predictor_ablation.py --cluster mine --dry-run account=abc": Run("#SBATCH --constraint=a100"),
    _START_SLURM: Run("export SLURM_CONF=/tmp/ms/etc/slurm.conf", starts_others=True),
    "python sweeps/predictor_ablation.py --cluster test_cluster --scale smoke micro_batch_size=16": Run(
        "#SBATCH --gres=gpu:4", "--dry-run"
    ),
    "python tests/support/slurm_cluster.py stop /tmp/ms": Run("", starts_others=True, after=(_START_SLURM,)),
    "python sweeps/predictor_ablation.py --cluster komondor --backend allocation --nodes 3 --dry-run account=abc": Run("#SBATCH --nodes=3"),
    "python sweeps/predictor_ablation.py --cluster komondor --backend allocation --nodes 3 --trials-per-node 12 --dry-run account=abc": Run(
        "36 workers at once"
    ),
    _PACK: Run("200 training and 200 validation images"),
    "python -m jobs.pretrain data=imagenet100 data.root=/scratch/in100 encoder.name=resnet50": Run(
        "completed: ",
        "",
        "data.name=imagefolder encoder.name=resnet18 data.image_size=96 data.workers=0 data.holdout_fraction=0.2 epochs=1 "
        "optimizer.warmup_epochs=0 "
        "global_batch_size=32 micro_batch_size=32 probes.linear_paper_epochs=1",
        after=(_PACK,),
    ),
    "python -m jobs.preflight --gpu encoder.name=resnet50 data.image_size=224 precision=bf16": Run("not run: "),
    "python -m jobs.drill --cluster komondor account=abc --dry-run": Run("#SBATCH --partition=gpu"),
    "python sweeps/predictor_ablation.py --cluster local --retry-failed": Run(
        "linear top-1, test", f"--name {Path(_ABLATION).name} --seeds 1", _SHORT, after=(_RUN_ABLATION,)
    ),
    f"python -m jobs.probe {_ABLATION}": Run("nothing to do, all scores are there", after=(_RUN_ABLATION,)),
    f"python -m jobs.probe {_ABLATION} 'probes.names=[linear,knn,collapse]'": Run(
        "nothing to do, all scores are there", after=(_RUN_ABLATION,)
    ),
    f"python -m jobs.probe {_ABLATION} 'probes.names=[few_shot,label_fraction,robustness]' 'probes.data=[fashion_mnist]'": Run(
        "to score: few_shot, label_fraction, robustness, few_shot.fashion_mnist", "--dry-run", after=(_RUN_ABLATION,)
    ),
    "python -m jobs.pretrain 'probes.names=[linear,knn,collapse,few_shot,label_fraction]'": Run(
        "few_shot.shots1_test_top1", "", f"{_SHORT} data.train_limit=400"
    ),
    f"python -m jobs.probe {_ABLATION} probes.knn_k=20": Run("(configured otherwise than in the run: scores/knn-", after=(_RUN_ABLATION,)),
    f"python -m jobs.probe {_ABLATION} 'probes.data=[fashion_mnist]'": Run(
        "to score: linear.fashion_mnist", "--dry-run", after=(_RUN_ABLATION,)
    ),
    _RUN_SINGLE: Run("completed: ", "", _SHORT),
    _RUN_STABLE: Run("completed: ", "", _SHORT),
    "python -m jobs.pretrain --like runs/short epochs=15 run_dir=runs/long": Run(
        "the end of its stable phase", "", "epochs=3", after=(_RUN_STABLE,)
    ),
    "python sweeps/predictor_ablation.py --cluster local --until-decided 8": Run("until decided: after 2 seeds", "--dry-run"),
    f"python -m jobs.pretrain data=digits epochs=10 {_SINGLE}=64 micro_batch_size=64 retry_failed=true": Run(
        "completed: ", "", _SHORT, after=(_RUN_SINGLE,)
    ),
    "python sweeps/joint_search.py --cluster komondor --dry-run account=abc": Run("multi_fidelity chooses up to 40 configurations"),
    "python sweeps/learning_rate.py --cluster local --sampler grid --seeds 3": Run("72 trials", "--dry-run"),
    "python sweeps/predictor_depth.py --cluster local --dry-run": Run("8 trials, 4 epochs each"),
    _RUN_DEPTH: Run("linear top-1, test", f"--name {Path(_DEPTH).name} --seeds 1", _SHORT, starts_others=True),
    "python sweeps/predictor_depth.py --cluster local --seeds 3": Run("12 trials, 4 epochs each", "--dry-run"),
    f"python -m sweeps results {_DEPTH} --format latex": Run(r"\begin{tabular}", after=(_RUN_DEPTH,)),
    _RUN_RATE: Run(
        "linear top-1, test",
        f"--name {Path(_RATE).name} --max-trials 2 --seeds 1",
        "data.train_limit=160 data.test_limit=60 probes.linear_paper_epochs=5",
        starts_others=True,
    ),
    "python sweeps/rate_and_depth.py --cluster local --sampler grid --dry-run": Run("36 trials, 8 epochs each"),
    "python sweeps/rate_and_depth.py --cluster local --early-stopping none": Run("configurations", "--dry-run"),
    "python -m sweeps status runs/joint_search-smoke": Run("trials (of up to 2 configurations)", after=(_RUN_RATE,)),
    "python -m sweeps study runs/joint_search-smoke": Run("optuna-dashboard ", after=(_RUN_RATE,)),
    f"python -m jobs.pretrain data=fashion_mnist epochs=10 {_SINGLE}=128": Run("completed: ", "", _SHORT),
    f"python -m jobs.pretrain method=simclr epochs=10 {_SINGLE}=128": Run("completed: ", "", f"{_SHORT} method.hidden=32"),
    f"python -m jobs.pretrain -m optimizer.lr=0.001,0.003 epochs=10 {_SINGLE}=128": Run("completed: ", "", _SHORT, starts_others=True),
    f"torchrun --nproc-per-node=2 -m jobs.pretrain epochs=10 {_SINGLE}=128 micro_batch_size=64": Run(
        "completed: ", "", f"{_SHORT} micro_batch_size=16", starts_others=True
    ),
    "python -m jobs.export runs/single/<run-id>": Run("backbone.safetensors: target backbone after", after=(_RUN_SINGLE,)),
    "tensorboard --logdir runs/single": Run("These tags are in", "--inspect", after=(_RUN_SINGLE,)),
    f"python -m sweeps results {_ABLATION} --format latex": Run(r"\begin{tabular}", after=(_RUN_ABLATION,)),
    f"python -m sweeps advice {_ABLATION}": Run("used at most", after=(_RUN_ABLATION,)),
    "python sweeps/predictor_ablation.py --cluster local --prune-on rankme --prune-on knn 'probes.at_epochs=[3,6,9]'": Run(
        "22 trials, 8 epochs each", "--dry-run"
    ),
}

# Run by another test, which makes its words of the command by `typed`, by .ci/run, or by another target of the Makefile.
ELSEWHERE = {
    "optuna-dashboard runs/joint_search-smoke/optuna.journal": (
        "tests/sweeps/report/test_optuna_study.py::test_optuna_dashboard_opens_the_mirror"
    ),
    "make ablation": "Makefile",
    **dict.fromkeys(
        (
            "python -m sweeps new my_question",
            "python -m sweeps run my_question.py --cluster local --dry-run",
            "python -m sweeps run my_question.py --cluster local",
        ),
        "tests/sweeps/cli/test_new.py::test_what_it_writes_is_planned_and_learns",
    ),
    "python -m sweeps export runs/predictor_ablation-smoke --to mlflow": (
        "tests/sweeps/report/test_exported.py::test_mlflow_is_brought_up_to_date_and_nothing_is_there_twice"
    ),
    "python -m sweeps export runs/predictor_ablation-smoke --to mlflow --tracking-uri sqlite:///mlflow.db --experiment predictors": (
        "tests/sweeps/report/test_exported.py::test_mlflow_has_a_run_for_each_trial_with_the_numbers_of_results_csv"
    ),
    "python -m sweeps export runs/predictor_ablation-smoke --to wandb --offline": (
        "tests/sweeps/report/test_exported.py::test_wandb_has_offline_what_results_csv_has_and_is_written_anew_where_it_changed"
    ),
    "make gpu": "tests/test_on_cuda.py::test_make_gpu_says_not_run_and_why_and_succeeds_without_cuda",
    "make install": ".ci/run",
    "python -m jobs.drill": "tests/sweeps/drill/test_drill.py::test_a_drill_that_is_ended_leaves_no_process_and_no_folder",
    "python -m jobs.drill --task my_sweep.py epochs=6": (
        "tests/jobs/resuming/test_program.py::test_a_sweep_s_file_is_drilled_with_the_values_of_its_first_configuration"
    ),
    "python -m jobs.drill --task my_training:TASK epochs=6": (
        "tests/jobs/resuming/test_program.py::test_a_task_that_forgets_a_generator_is_told_so"
    ),
    "python -m jobs.drill --command 'sh train.sh {run_dir}'": (
        "tests/jobs/resuming/test_program.py::test_the_first_metric_and_step_of_a_command_that_differ_are_named"
    ),
    "python -m jobs.drill --faults 100 --seed 7 --runs-dir runs": "tests/sweeps/drill/test_drill.py::test_a_few_faults_lose_nothing",
    "python -m cnnjepa.data.pack torchvision:FashionMNIST /scratch/fashion --root /data": (
        "tests/cnnjepa/data/test_pack_sources.py::test_a_torchvision_set_is_packed_without_loss"
    ),
    **dict.fromkeys(
        ("python mine/digits_rate.py --cluster local --seeds 2", "python -m sweeps results runs/digits_rate-smoke"),
        "tests/test_docs_own_task.py::test_a_function_is_swept_as_it_stands_on_the_page",
    ),
    **dict.fromkeys(
        (
            "export PYTHONPATH=$PWD/mine",
            "python mine/softmax_rate.py --cluster local",
            "python -m sweeps results runs/softmax_rate-smoke",
            "python -m jobs.pretrain task=softmax_task epochs=5",
        ),
        "tests/test_docs_own_task.py::test_the_example_is_swept_as_it_stands_on_the_page",
    ),
}

# Printed by a command that is typed here, for the reader to type.
PRINTED = {"export SLURM_CONF=/tmp/ms/etc/slurm.conf": "python tests/support/slurm_cluster.py start /tmp/ms"}


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.page}: {c.text}")
def test_a_command_is_typed_here_or_run_elsewhere_or_marked(command: Command) -> None:
    ways = [command.text in TYPED, command.text in ELSEWHERE, command.text in PRINTED, bool(command.mark)]
    assert sum(ways) == 1, f"add it to TYPED, to ELSEWHERE, or end its comment with one of {list(MARKS)}"
    assert not command.mark or any(word in command.text for word in MARKS[command.mark]), "what needs a cluster names one"


def test_no_entry_outlives_its_command() -> None:
    reported = {c.text for c in commands()}
    assert sorted({*TYPED, *ELSEWHERE, *PRINTED} - reported) == []
    assert all(TYPED[by].said == text for text, by in PRINTED.items())


@pytest.mark.parametrize("text", ELSEWHERE)
def test_what_is_run_elsewhere_is_run_there(text: str) -> None:
    file, _, test = ELSEWHERE[text].partition("::")
    source = (ROOT / file).read_text()
    if test:
        assert test.startswith("test_")
        assert text in typed_by(source, test)
        return
    lines = [line.partition("#")[0].strip().removeprefix("part ") for line in source.splitlines()]
    if file == "Makefile":
        assert text.replace("make", "$(MAKE)") in lines
        return
    assert "set -euo pipefail" in lines
    assert text in lines


def test_a_command_is_run_by_a_test_that_makes_its_words_of_it_and_by_no_other() -> None:
    """Neither a text that only stands there, nor a helper, nor words that nobody takes."""
    source = """
from tests.support.documented import typed
TEXT = "python a"
def helper(): return typed("python b", {})
def test_one(): run(typed("python a", {}))
def test_two():
    "python c"
    typed("python d", {})
"""
    assert typed_by(source, "test_one") == ["python a"]
    assert typed_by(source, "test_two") == []
    assert typed_by(source, "test_three") == []
    assert typed("python -m x --faults 100 'a b'", {"python": "py", "100": "2"}) == ["py", "-m", "x", "--faults", "2", "a b"]
    with pytest.raises(ValueError, match=r"'python x' has no --seed"):
        typed("python x", {"--seed": "1"})


def test_the_mark_is_read_at_the_end_of_a_comment_alone() -> None:
    assert Command("x", "sbatch", "it needs a cluster").mark
    assert not Command("x", "sbatch", "needs a cluster, or not").mark
    assert Run("", "--dry-run", "b=2").words("python x.py --seeds 5 a=1") == ["python", "x.py", "--seeds", "5", "--dry-run", "a=1", "b=2"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    files = {p: p.stat().st_mtime_ns for p in _checkout()}
    opened = Session(tmp_path_factory.mktemp("typed"))
    yield opened
    opened.close()
    assert {p: p.stat().st_mtime_ns for p in _checkout()} == files, "nothing is written into the checkout"


def _checkout() -> list[Path]:
    own = (ROOT / part for part in ("cnnjepa", "jobs", "sweeps", "slurm", "docs", "runs"))
    return [p for part in own for p in part.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


_NEEDS_SLURM = [text for text in TYPED if "slurm_cluster.py" in text]


@pytest.mark.slow
@pytest.mark.xdist_group("typed commands")
@pytest.mark.parametrize("text", [pytest.param(t, marks=needs_slurm) if t in _NEEDS_SLURM else t for t in TYPED])
def test_the_command_does_what_the_page_says(text: str, session: Session) -> None:
    status, output = session.type(text, TYPED)
    assert status == 0, output
    assert session.place(TYPED[text].said) in output, output


def test_the_examples_are_not_here_yet() -> None:
    """A reader who saves one overwrites nothing."""
    assert [path for path in EXAMPLES if (ROOT / path).exists()] == []
