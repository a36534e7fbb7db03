"""`python -m jobs.pretrain` as a user runs it: alone, stopped and resumed, under torchrun, as a Hydra multirun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from omegaconf import OmegaConf

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from jobs import pretrain as command
from jobs.config import compose_job
from jobs.run import run_job
from jobs.slurm.ranks import adopt_srun_ranks
from tests.support import forked
from tests.support.held import environment, wait_until
from tests.support.runs import comparable
from tests.support.tiny import OVERRIDES

SMALL = [*OVERRIDES, "epochs=2"]


# An agent with a store of its own at a port that it keeps: none is looked up and let go.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def pretrain(arguments: list[str], launcher: list[str] | None = None, **more: object) -> subprocess.CompletedProcess:
    """The command, forked where no launcher is given."""
    words = ["-m", "jobs.pretrain", *arguments]
    if launcher is None:
        return forked.run(words, **more)
    return subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300, check=False, **more)  # type: ignore[call-overload, no-any-return]


@pytest.mark.slow
def test_a_run_loads_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """A job pays for each import with all of its GPUs, at each start."""
    heavy = ("torch._dynamo", "torchvision", "sympy", "ray", "optuna", "matplotlib", "plotly", "sklearn", "scipy", "pandas")
    program = f"""
import sys
from jobs.pretrain import run
from jobs.config import compose_job
assert run(compose_job({[*SMALL, f"run_dir={tmp_path / 'run'}"]!r})) == 0
print("loaded:", [name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.slow
def test_a_run_ends_with_its_scores_its_provenance_and_status_0(tmp_path: Path) -> None:
    done = pretrain([*SMALL, f"run_dir={tmp_path / 'run'}"], [sys.executable])
    assert done.returncode == 0, done.stderr
    assert "linear.test_top1 = " in done.stdout
    assert "step 10/10" in done.stdout
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert {"commit", "diff", "packages", "host", "time", "command"} <= set(provenance)
    assert provenance["packages"]["torch"]
    again = pretrain([*SMALL, f"run_dir={tmp_path / 'run'}"])
    assert again.returncode == 0
    assert "step" not in again.stdout.replace("steps", "")


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_the_same_experiment(tmp_path: Path) -> None:
    done = pretrain([*SMALL, "precision=fp64", f"run_dir={tmp_path / 'two'}"], TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 10/10") == done.stdout.count("completed: ") == 1
    pretrain([*SMALL, "precision=fp64", f"run_dir={tmp_path / 'one'}"])
    two, one = (RunFolder(tmp_path / name).result() for name in ("two", "one"))
    assert two is not None
    assert one is not None
    assert two.metrics == pytest.approx(one.metrics, rel=1e-6)


def held(arguments: list[str], tmp_path: Path, **more: str) -> forked.Forked:
    """The command, in a session of its own, when it has recorded step 3; it goes on when `tmp_path / "held"` is removed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = ["-m", "tests.support.held", "jobs.pretrain", *arguments]
    child = forked.start(words, env={**environment(tmp_path / "held", 3), **more}, start_new_session=True, **pipes)
    wait_until("step 3", (tmp_path / "held").exists, lambda: child.poll() is None)
    return child


def test_sigterm_saves_and_the_same_command_resumes_bit_for_bit(tmp_path: Path) -> None:
    arguments = [*SMALL, f"run_dir={tmp_path / 'a'}"]
    child = held(arguments, tmp_path)
    child.send_signal(signal.SIGTERM)
    (tmp_path / "held").unlink()
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "stopped, checkpoint saved" in out
    assert "SIGTERM: saving a checkpoint" in err
    assert RunFolder(tmp_path / "a").result() is None
    assert checkpoint.find(tmp_path / "a" / "checkpoints")[0].step in (3, 4), "it stops at the step's end, or the next one's"
    assert pretrain(arguments).returncode == 0
    assert pretrain([*arguments[:-1], f"run_dir={tmp_path / 'b'}"]).returncode == 0
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")


def test_ctrl_c_to_the_whole_group_leaves_loader_processes_until_the_checkpoint_is_saved(tmp_path: Path) -> None:
    child = held([*SMALL, "epochs=50", "data.workers=2", f"run_dir={tmp_path / 'a'}"], tmp_path)
    assert len(psutil.Process(child.pid).children()) >= 2
    os.killpg(child.pid, signal.SIGINT)
    (tmp_path / "held").unlink()
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "stopped, checkpoint saved" in out
    assert err.count("saving a checkpoint") == 1
    assert RunFolder(tmp_path / "a").result() is None


def test_a_multirun_keeps_one_folder_a_run(tmp_path: Path) -> None:
    done = pretrain(["-m", *SMALL, "epochs=1", "optimizer.lr=0.001,0.002", "cluster.runs_dir=runs"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "runs" / "single").iterdir())
    assert [RunFolder(f).config().optimizer.lr for f in folders] != []
    assert {RunFolder(f).config().optimizer.lr for f in folders} == {0.001, 0.002}
    assert all(RunFolder(f).result().status is RunStatus.completed for f in folders)  # type: ignore[union-attr]


def test_one_failing_run_of_a_multirun_stops_no_other(tmp_path: Path) -> None:
    done = pretrain(["-m", *SMALL, "epochs=1", "optimizer.lr=1e30,0.002", "cluster.runs_dir=runs"], cwd=tmp_path)
    assert done.returncode == 1
    ended = {RunFolder(f).config().optimizer.lr: RunFolder(f).result() for f in (tmp_path / "runs" / "single").iterdir()}
    assert {lr: r and r.status for lr, r in ended.items()} == {1e30: RunStatus.failed, 0.002: RunStatus.completed}


@pytest.mark.parametrize(
    ("main", "executor", "asked", "status"),
    [
        ("submitit.core._submit", "slurm", ["17"], 130),  # a job of the launcher's own
        ("submitit.core._submit", "local", [], None),  # a process that the launcher has started within an allocation
        ("jobs.pretrain", "", [], 130),
        ("jobs.pretrain", "slurm", [], 130),  # a shell within such a job
    ],
)
def test_only_a_job_that_the_launcher_submitted_requeues_itself(
    main: str, executor: str, asked: list[str], status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others may run in an allocation that is the user's."""
    requeued: list[str] = []
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name=main)))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    for name, found in (("job_from", None), ("adopt_srun_ranks", None), ("run", 130), ("job_state", "RUNNING")):
        monkeypatch.setattr(command, name, lambda *_, found=found: found)
    monkeypatch.setattr(command, "requeue", lambda job: requeued.append(job) or True)
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    if status is None:
        command._hydra_run.__wrapped__(OmegaConf.create())
    else:
        with pytest.raises(SystemExit) as end:
            command._hydra_run.__wrapped__(OmegaConf.create())
        assert end.value.code == status
    assert requeued == asked


def test_a_grid_that_is_stopped_begins_no_further_run(tmp_path: Path) -> None:
    """Also within an allocation, which it leaves alone."""
    grid = ["-m", *SMALL, "epochs=50", "optimizer.lr=0.001,0.002", f"cluster.runs_dir={tmp_path / 'runs'}"]
    child = held(grid, tmp_path, SLURM_JOB_ID="17")
    child.send_signal(signal.SIGTERM)
    (tmp_path / "held").unlink()
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert out.count("stopped, checkpoint saved") == 1
    assert len(list(tmp_path.glob("runs/single/*/metrics.jsonl"))) == 1


@pytest.mark.slow
def test_the_death_of_a_rank_is_no_failure_of_the_run(tmp_path: Path) -> None:
    arguments, file = [*SMALL, f"run_dir={tmp_path / 'run'}"], tmp_path / "held"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([*TORCHRUN, "-m", "tests.support.held", "jobs.pretrain", *arguments], env=environment(file, 3), **quiet)
    try:
        wait_until("step 3", file.exists, lambda: child.poll() is None)
        folder = RunFolder(tmp_path / "run")
        wait_until("checkpoint", lambda: checkpoint.find(folder.checkpoints), lambda: child.poll() is None)
        ranks = [p for p in psutil.Process(child.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].kill()
        file.unlink()
        assert child.wait(timeout=120) != 0
    finally:
        file.unlink(missing_ok=True)
        child.kill()
        child.wait()
    assert folder.result() is None
    again = pretrain(arguments, TORCHRUN)
    assert again.returncode == 0, again.stderr
    result = folder.result()
    assert result is not None
    assert result.resumes == 1


def test_a_failed_run_is_tried_again_when_asked(tmp_path: Path) -> None:
    arguments = [*SMALL, "epochs=1", f"run_dir={tmp_path}"]
    folder = RunFolder(tmp_path)
    folder.prepare(compose_job(arguments).train)
    folder.write_result(RunResult(RunStatus.failed, "OSError: No space left on device"))
    done = pretrain(arguments)
    assert done.returncode == 1
    assert "cause: OSError: No space left on device" in done.stdout
    assert "retry_failed=true" in done.stdout
    assert pretrain([*arguments, "retry_failed=true"]).returncode == 0
    assert (tmp_path / "result.failed-1.json").exists()


def test_a_diverged_run_is_failed_with_step_and_learning_rate_and_what_it_cost(tmp_path: Path) -> None:
    job = compose_job([*SMALL, "optimizer.lr=1e30", f"run_dir={tmp_path}"])
    result = run_job(job)
    assert result is not None
    assert result.status is RunStatus.failed
    assert result.cause.startswith("NonFiniteError: loss ")
    assert "step 1, learning rate 1e+30" in result.cause
    assert result.device_hours > 0
    assert result == RunFolder(tmp_path).result()


def test_srun_ranks_become_torchruns_variables() -> None:
    task = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu07",
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_ID": "0",
    }
    environment = dict(task)
    adopt_srun_ranks(environment)
    assert {k: environment[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
    }
    assert 1024 < int(environment["MASTER_PORT"]) < 32768
    batch_script = {k: v for k, v in task.items() if not k.startswith("SLURM_STEP")}
    adopt_srun_ranks(batch_script)
    assert "RANK" not in batch_script
    launched = {**task, "RANK": "0", "WORLD_SIZE": "2"}
    adopt_srun_ranks(launched)
    assert launched["WORLD_SIZE"] == "2"
