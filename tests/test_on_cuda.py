"""`make gpu`: what it says without a GPU, what it holds to be different, and a rehearsal of all its parts on CPU."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import _cuda_parts
import pytest
import torch
from _cuda_parts import bucket_apart
from _cuda_run import Answer, Setup, WrongError, completed, drawn, judge_run, kill_halfway, losses_apart, settled
from _in_parts import Outcome

from tests.support.documented import typed
from tests.test_in_parts import answering, part
from tests.test_same_run import different, step_record

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "benchmarks" / "on_cuda.py"
NO_CUDA = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def on_cuda() -> ModuleType:
    return importlib.import_module("on_cuda")


def test_make_gpu_says_not_run_and_why_and_succeeds_without_cuda() -> None:
    ready = ["-o", f"{sys.prefix}/.ready", f"VENV={sys.prefix}"]  # what it needs is installed where the tests run
    environment = {**os.environ, **NO_CUDA, "PYTHONPATH": str(ROOT)}
    line = ["make", "-s", *ready, *typed("make gpu", {})[1:]]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(lines := done.stdout.splitlines()) <= {"not run: torch sees no CUDA device", "not run: this torch is built without CUDA"}
    assert len(lines) == 2, "the check that users have, and the comparisons that only the checkout has"


def test_without_cuda_the_json_is_one_valid_object(
    on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["on_cuda.py", "--json"])
    assert on_cuda.main() == 0
    reported = json.loads(capsys.readouterr().out)
    assert set(reported) == {"machine", "command", "n", "figures"}
    assert reported["figures"] == {"outcome": "not run", "why": on_cuda.why_not(), "rehearsal": False, "parts": {}}
    monkeypatch.setattr(torch.version, "cuda", None)
    assert on_cuda.why_not() == "this torch is built without CUDA"


def test_ranks_and_one_rank_are_compared_by_each_steps_loss(tmp_path: Path) -> None:
    for name, losses in {"many": [4.0, 2.0], "one": [4.0, 2.5], "short": [4.0], "none": []}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps(step_record(i + 1, loss)) + "\n" for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join([*lines, '{"kind": "final", "step": 2}\n', '{"torn']))
    assert losses_apart(tmp_path / "many", tmp_path / "many") == (0, 2)
    assert losses_apart(tmp_path / "many", tmp_path / "one") == (pytest.approx(0.2), 2)
    assert losses_apart(tmp_path / "many", tmp_path / "short")[0] == math.inf
    assert losses_apart(tmp_path / "none", tmp_path / "none")[0] == math.inf


def test_the_settled_pace_and_wait_are_those_of_the_second_half_by_its_time() -> None:
    paces = [(1.0, 1.0), (1.0, 1.0), (10.0, 0.1), (40.0, 0.6)]
    found = settled([{"images_per_second": p, "data_wait_share": w} for p, w in paces], batch=20)
    # 20 images in 2 s, 0.2 of them waiting, and 20 in 0.5 s, 0.3 of them waiting.
    assert found == {"settled_images_per_second": pytest.approx(16.0), "settled_data_wait_share": pytest.approx(0.2)}


def test_what_nvml_does_not_tell_is_said_and_why() -> None:
    figures = {"joules_per_image": 0.25, "watts": 500.0, "gpu_utilisation": 0.9}
    assert drawn(figures, "") == "0.250 J an image, 500 W, utilisation 90%"
    assert drawn({**figures, "gpu_utilisation": None}, "MIG") == "0.250 J an image, 500 W, the rest not reported by NVML: MIG"
    assert drawn(dict.fromkeys(figures), "no library") == "energy and utilisation not reported by NVML: no library"


def test_buckets_through_a_group_of_one_rank_give_half_of_each_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket_apart("cpu") == 0
    monkeypatch.setattr(torch.distributed, "all_reduce", _forgets_the_last)
    assert bucket_apart("cpu") > 1e-9


def _forgets_the_last(message: torch.Tensor, async_op: bool) -> Any:
    message[-1] = 0

    class Work:
        def wait(self) -> None:
            pass

    return Work()


def test_a_small_gpu_or_little_shared_memory_has_smaller_batches_and_fewer_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Setup(gpu_gb=80).batch, Setup(gpu_gb=12).batch, Setup(gpu_gb=80).steps) == (128, 32, 128)
    for free, workers in ((2**40, 14), (2 * 4 * 128 * 3 * 224 * 224, 2), (0, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
        assert Setup(cores=16).workers == workers
    monkeypatch.undo()
    assert Setup(cores=1).workers == 0


# What the parts check.


def test_a_command_that_fails_or_whose_run_did_not_complete_is_wrong_and_says_why(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    good = {"status": "completed", "missing": {}, "cause": ""}

    def result_of(code: str, **more: Any) -> dict[str, Any]:
        (run_dir / "result.json").write_text(json.dumps(good | more))
        return completed([sys.executable, "-S", "-c", code], run_dir)

    assert result_of("") == good
    with pytest.raises(WrongError, match=r"^status 1 of .*: ValueError: a planted fault$"):
        result_of("raise ValueError('a planted fault')")
    with pytest.raises(WrongError, match=r"^the run is failed, without value: NonFiniteError: loss$"):
        result_of("", status="failed", cause="NonFiniteError: loss")
    with pytest.raises(WrongError, match=r"without value: .*knn"):
        result_of("", missing={"knn": "no neighbours"})


def test_a_run_is_judged_by_its_steps_its_losses_and_its_probe(tmp_path: Path) -> None:
    numbers = {"step": 2, "seconds": 4.0, "energy_kwh": 1e-6, "gpu_utilisation": 0.5, "images_per_second": 9.0}
    result = {**numbers, "data_wait_share": 0.1, "peak_memory_mb": 100.0, "metrics": {"linear.test_top1": 12.5}}

    def judged(losses: list[float | None], **more: Any) -> Answer:
        lines = [json.dumps({**step_record(i + 1, 0.0), "loss": loss}) + "\n" for i, loss in enumerate(losses)]
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
        answer = Answer()
        judge_run(answer, Setup(), result | more, tmp_path, batch=9, steps=2)
        return answer

    good = judged([2.0, 1.0])
    assert good.wrong == []
    assert (good.figures["joules_per_image"], good.figures["watts"]) == (pytest.approx(0.2), pytest.approx(0.9))  # 3.6 J, 18 images, 4 s
    assert (good.figures["first_loss"], good.figures["last_loss"], good.figures["nvml"]) == (2.0, 1.0, "")
    assert judged([2.0, None]).wrong == ["a loss is not finite"]
    assert judged([2.0]).wrong == ["1 steps are recorded, and not 1 to 2"]
    assert judged([2.0, 1.0], metrics={}).wrong == ["the linear probe has no test_top1"]
    assert "NVML" in " ".join(judged([2.0, 1.0], energy_kwh=None).said)


@pytest.mark.parametrize(("apart", "wrong"), [(1e-9, 0), (1.1e-9, 1), (math.inf, 1)])
def test_execution_and_ranks_may_be_a_billionth_apart_and_no_more(
    apart: float, wrong: int, on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {"worst_apart": apart, "rows": [{"run again": 0.0, "resumed": 0.0}]}
    monkeypatch.setattr(importlib.import_module("_execution"), "execution", lambda encoders, device: found)
    assert len(_cuda_parts.execution(tmp_path, Setup("cpu")).wrong) == wrong
    monkeypatch.setattr(_cuda_parts, "completed", lambda line, run_dir: {})
    for losses, bucket in ((apart, 0.0), (0.0, apart)):
        monkeypatch.setattr(_cuda_parts, "losses_apart", lambda run, other, losses=losses: (losses, 1))
        monkeypatch.setattr(_cuda_parts, "bucket_apart", lambda device, bucket=bucket: bucket)
        assert len(_cuda_parts.ranks(tmp_path, Setup("cpu")).wrong) == wrong


def test_a_run_that_began_again_was_not_resumed(on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    same = {**different(None, 0.0), "same_bits": True}
    monkeypatch.setattr(importlib.import_module("_same_run"), "hold_against", lambda run, other: same)
    kills = iter([None, (10, 12)])
    monkeypatch.setattr(_cuda_parts, "kill_halfway", lambda line, run_dir, steps: next(kills))
    monkeypatch.setattr(_cuda_parts, "completed", lambda line, run_dir: {"resumes": 0})
    answer = _cuda_parts.resumed(tmp_path, Setup("cpu"))
    assert answer.wrong == ["the run has not been resumed: it began again"]
    assert (answer.figures["resumed_at"], answer.figures["killed_at"]) == (10, 12)
    monkeypatch.setattr(_cuda_parts, "kill_halfway", lambda line, run_dir, steps: None)
    with pytest.raises(WrongError, match="the run ended 3 times before it could be killed"):
        _cuda_parts.resumed(tmp_path, Setup("cpu"))


# A run of 20 steps that does as it is asked: saves at a step, records so many, ends; saves when it is asked to stop.
PRETENDS = """
import pathlib, signal, sys, time
folder, saved, recorded, ends = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
checkpoints = folder / "checkpoints"
def save(step):
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / f"step-{step:09d}-0123456789abcdef.pt").touch()
def stop(*_):
    save(recorded)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
if checkpoints.exists():
    recorded += 1
folder.mkdir(exist_ok=True)
lines = "".join('{"kind": "step", "step": %d}\\n' % (i + 1) for i in range(recorded))
if saved:
    save(saved)
(folder / "part").write_text(lines)
(folder / "part").rename(folder / "metrics.jsonl")
if ends:
    (folder / "result.json").write_text("{}")
else:
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("saved", "recorded", "ends", "kill"),
    [
        (5, 7, False, (5, 7)),  # has a checkpoint and went beyond it
        (0, 13, False, (13, 14)),  # most of its steps and no checkpoint: asked to stop, started again, then killed
        (0, 20, True, None),
    ],
)
def test_a_run_is_killed_beyond_a_checkpoint_however_slow_the_disk(
    saved: int, recorded: int, ends: bool, kill: tuple[int, int] | None, tmp_path: Path
) -> None:
    line = [sys.executable, "-S", "-c", PRETENDS, str(tmp_path / "run"), str(saved), str(recorded), str(int(ends))]
    assert kill_halfway(line, tmp_path / "run", steps=20) == kill


@pytest.mark.parametrize(("code", "status"), [(answering([]), 0), (answering(["1 is not 2"]), 1), ("1 / 0", 1)])
def test_status_is_1_where_a_part_failed_and_the_json_has_no_infinity(
    code: str, status: int, on_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_cuda, "parts_of", lambda names, folder, setup: [part("digits", code), part("ranks", answering([]))])
    for as_json in (True, False):
        monkeypatch.setattr(sys, "argv", ["on_cuda.py", "--rehearse", *["--json"] * as_json])
        assert on_cuda.main() == status
        out = capsys.readouterr().out
        if as_json:
            figures = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["figures"]
            assert (figures["outcome"], figures["ranks"]) == (["passed", "failed"][status], {"x": 1, "far": None})
            assert figures["why"] == ["", "failed: digits"][status]
        else:
            assert "REHEARSAL ON CPU" in out
            assert ("failed: digits" in out) == bool(status)


def test_where_no_part_had_time_the_whole_was_not_run(on_cuda: ModuleType) -> None:
    nothing = {"digits": Outcome("not run", "no time left"), "ranks": Outcome("not run", "no time left")}
    assert on_cuda.figures_of(nothing, {}, False, 0.0)["outcome"] == "not run"
    assert on_cuda.figures_of({**nothing, "step": Outcome("passed")}, {}, False, 0.0)["outcome"] == "passed"


# The rehearsal.


def rehearse(folder: Path, parts: list[str]) -> dict[str, Any]:
    """The figures of a rehearsal of some parts on CPU, done in `folder`."""
    words = ["--rehearse", "--json", "--folder", str(folder), "--budget-minutes", "60"]
    line = [sys.executable, str(SCRIPT), *words, "--only", *parts]
    done = subprocess.run(line, env={**os.environ, **NO_CUDA, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["figures"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("gpu") / "work"
    yield folder, rehearse(folder, ["set", "digits", "packed", "resumed"])
    shutil.rmtree(folder)


RUN = {"steps", "batch", "first_loss", "last_loss", "seconds", "images_per_second", "settled_images_per_second", "settled_data_wait_share"}
RUN |= {"data_wait_share", "gpu_utilisation", "energy_kwh", "joules_per_image", "watts", "peak_memory_mb", "linear_top1", "nvml"}
STEP = {"batch", "dtype", "encoder", "size", "steps", "images_per_second", "ms_per_step", "peak_mb", "reserved_mb", "joules_per_image"}
STEP |= {"watts", "gpu_utilisation", "not_measured"}
RESUMED = {"killed_at", "resumed_at", "resumes", "same_bits", "largest_relative", "where", "loss_apart", "first_different_step"}
FIGURES = {
    "set": {"images", "bytes_per_image", "seconds", "making_seconds"},
    "digits": RUN,
    "packed": RUN | {"loader_processes"},
    "resumed": RESUMED | {"first_difference", "twice"},
    "ranks": {"ranks", "backend", "loss_apart", "at_step", "group_of_one_apart"},
    "execution": {"worst_apart", "rows"},
    "step": {"rows", "nvml"},
}


def assert_documented(reported: dict[str, Any], documented: str, *parts: str) -> None:
    """Those parts have passed, with the figures of FIGURES, each of which the script's own text names."""
    assert (reported["outcome"], reported["rehearsal"], reported["why"]) == ("passed", True, "")
    assert {n: reported["parts"][n]["outcome"] for n in parts} == dict.fromkeys(parts, "passed")
    asked = {n: FIGURES[n] for n in parts if n in FIGURES}
    assert {n: set(reported[n]) for n in asked} == asked
    assert reported["machine"]["gpus"] == []
    for key in set().union(*asked.values(), reported["machine"]):
        assert key in documented, f"{key} is not documented"


@pytest.mark.xdist_group("rehearsal")
@pytest.mark.nightly
def test_a_rehearsal_on_cpu_trains_is_killed_and_resumes_with_the_documented_figures(
    rehearsed: tuple[Path, dict[str, Any]], on_cuda: ModuleType
) -> None:
    _, reported = rehearsed
    assert_documented(reported, on_cuda.__doc__ or "", "set", "digits", "packed", "resumed")
    resumed, packed = reported["resumed"], reported["packed"]
    assert packed["steps"] == 32
    assert packed["steps"] > resumed["killed_at"] > resumed["resumed_at"] >= 8
    assert resumed["resumes"] >= 1
    assert (resumed["same_bits"], resumed["largest_relative"], resumed["loss_apart"]) == (True, 0, 0)
    assert packed["nvml"] == "rehearsal on CPU"
    assert packed["energy_kwh"] is None


@pytest.mark.nightly
def test_a_rehearsal_on_cpu_runs_every_other_part_with_the_documented_figures(tmp_path: Path, on_cuda: ModuleType) -> None:
    parts = ["ranks", "execution", "step", "official_bf16"]  # official_fp32 is the same program
    reported, documented = rehearse(tmp_path / "work", parts), on_cuda.__doc__ or ""
    assert_documented(reported, documented, *parts)
    assert set(reported["step"]["rows"][0]) == STEP
    assert "official_style_over_fast_bf16" in reported["official_bf16"]
    for key in {*STEP, "official_style_over_fast_bf16", "official_style_over_fast"}:
        assert key in documented, f"{key} is not documented"
    assert reported["ranks"]["loss_apart"] <= 1e-9
    assert reported["execution"]["worst_apart"] <= 1e-9
    assert reported["step"]["nvml"] == "rehearsal on CPU"


# Python runs such a file at its start, where its folder is on PYTHONPATH: a resumed run forgets what the optimiser had averaged.
FORGETS = """
import sys
if "jobs.pretrain" in sys.orig_argv:
    import torch
    torch.optim.Optimizer.load_state_dict = lambda self, state: None
"""


@pytest.mark.xdist_group("rehearsal")
@pytest.mark.nightly
def test_a_resume_that_forgets_something_is_reported_as_different(rehearsed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = rehearsed
    for path in folder.glob("killed*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "sitecustomize.py").write_text(FORGETS)
    setup, answer = json.dumps({"device": "cpu", "cores": 1}), tmp_path / "answer.json"
    line = [sys.executable, str(SCRIPT.with_name("_cuda_parts.py")), "resumed", str(folder), setup, str(answer)]
    environment = {**os.environ, **NO_CUDA, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reported = json.loads(answer.read_text())
    (wrong,) = reported["wrong"]
    figures = reported["figures"]
    assert wrong.startswith("the resumed run is different: ")
    assert figures["where"].startswith(("optimizer.state.", "encoder.", "target_encoder.", "predictor.", "mask_token"))
    assert figures["first_different_step"] > figures["resumed_at"]
    assert figures["loss_apart"] > 0
