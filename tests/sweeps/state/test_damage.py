"""A damaged file costs one trial: it is named with what to do, everything else is read and runs, and nothing leaves the sweep's folder."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnjepa.run.files import SEAL, DamagedError
from sweeps.cli import run as command
from sweeps.execution import scheduler
from sweeps.report import aggregate, html_text, tables
from sweeps.report.status import counts_line, sweep_status
from sweeps.state import claims
from sweeps.state.claims import Claim
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support import damage
from tests.support.damaged import READERS, Capture, away, changed, finished, no_file, said
from tests.support.fault_target import SPECS, given, make_quick, work
from tests.support.fault_target import folder as folder_of
from tests.support.reported import made, provenance
from tests.support.sample import sampled


@pytest.fixture
def view(tmp_path: Path) -> View:
    return finished(tmp_path / "s")


# What happens to the folder of a trial -> what its cause begins with.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte of the result": (lambda t: (t / "result.json").write_bytes(b"x" + (t / "result.json").read_bytes()[1:]), "result.json"),
    "half a result": (lambda t: os.truncate(t / "result.json", 100), "result.json"),
    "empty result": (lambda t: os.truncate(t / "result.json", 0), "result.json"),
    "a list for hours": (lambda t: changed(t / "result.json", device_hours=[]), "result.json"),
    "a flipped key": (lambda t: changed(t / "result.json", devike_hours=1.0), "result.json"),
    "a word for a score": (lambda t: changed(t / "result.json", metrics={"linear.holdout_top1": "71"}), "result.json"),
    "a result that is a folder": (lambda t: no_file(t / "result.json"), "result.json"),
    "a claim of another number": (lambda t: changed(t / "claim" / "000001.json", epoch=2), "claim/000001.json"),
    "a claim without an owner": (lambda t: changed(t / "claim" / "000001.json", owner=None), "claim/000001.json"),
    "a word for a time": (lambda t: changed(t / "claim" / "000001.json", time="noon"), "claim/000001.json"),
    "half a claim": (lambda t: os.truncate(t / "claim" / "000001.json", 50), "claim/000001.json"),
    "metrics that are a folder": (lambda t: no_file(t / "metrics.jsonl"), "metrics.jsonl"),
    "claims that are a file": (lambda t: (os.rename(t / "claim", t / "was"), (t / "claim").write_text("x")), "claim"),
    "a link that leads away": (lambda t: away(t / "checkpoints"), "checkpoints"),
    "a result elsewhere": (lambda t: away(t / "result.json"), "result.json"),
}


ALL_READERS = ("first byte of the result", "half a claim", "a link that leads away")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_trial_is_named_and_the_others_are_read(
    kind: str, view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    inflict, file = KINDS[kind]
    trials, path = view.sweep.trials, view.sweep.path
    (path / "results.csv").write_text(tables.results_csv(view))
    before = damage.run_rows(path)
    inflict(view.sweep.trial_dir(trials[1]))
    fresh = View(Sweep.load(path))
    states = fresh.states()
    assert {t.signature for t in trials if states[t.signature] is TrialState.damaged} == {trials[1].signature}
    cause = fresh.damage(trials[1])
    assert cause.startswith(f"damaged: {file}: ")
    assert (fresh.result(trials[1]), fresh.claims(trials[1]), fresh.device_hours(trials[1])) == (None, [], 0.0)
    assert counts_line(sweep_status(fresh)).startswith("1 damaged, 5 completed of 6 trials")
    assert "1 damaged" in aggregate.run_set(fresh)
    assert [s.damaged for s in aggregate.summaries(fresh) if s.label == trials[1].label] == [1]
    for words in READERS if kind in ALL_READERS else READERS[:1]:
        status, out, err = said([words[0], str(path), *words[1:]], monkeypatch, capsys)
        assert (status, err) == (0, ""), (words, err)
        assert (words[0] != "status") or cause in out
    (path / "results.csv").write_text(tables.results_csv(fresh))
    rows = damage.run_rows(path)
    assert rows.pop(trials[1].signature)["cause"] == cause
    assert rows == {s: row for s, row in before.items() if s != trials[1].signature}
    if kind in ALL_READERS:
        page = (path / "report.html").read_text()
        assert "1 damaged" in page
        assert f"damaged: {file}" in page
    assert not list((tmp_path / "elsewhere").glob("*"))


def test_a_trial_that_was_repaired_is_there_again(view: View) -> None:
    trial, path = view.sweep.trials[0], view.sweep.trial_dir(view.sweep.trials[0]) / "result.json"
    good = path.read_bytes()
    path.write_bytes(b"x" + good[1:])
    assert view.state(trial) is TrialState.damaged
    path.write_bytes(good)
    assert view.state(trial) is TrialState.completed
    assert view.damage(trial) == ""
    assert view.result(trial) is not None


@pytest.mark.slow
@pytest.mark.parametrize("file", ["result.json", "claim/000001.json", "sweep.json", "provenance.json", "config.yaml", "metrics.jsonl"])
def test_a_flipped_byte_never_ends_in_a_traceback(file: str, view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """At positions drawn at random; the other trials stay readable, or one line names the sweep's own file."""
    path, draw = view.sweep.path, random.Random(f"{file} 3")
    trial = view.sweep.trials[0]
    provenance(view.sweep.trial_dir(trial))
    damaged = path / file if file == "sweep.json" else view.sweep.trial_dir(trial) / file
    good, others = damaged.read_bytes(), {t.signature for t in view.sweep.trials[1:]}
    (path / "results.csv").write_text(tables.results_csv(view))
    before = damage.run_rows(path)
    # The figure is the same, and takes most of the time.
    monkeypatch.setattr("sweeps.report.plots.draw", lambda view, path: None)
    for at in sorted(draw.sample(range(len(good)), 30)):
        damaged.write_bytes(good[:at] + bytes([good[at] ^ (1 << draw.randrange(8))]) + good[at + 1 :])
        for words in (["status"], ["results", "--format", "csv"]):
            status, _, err = said([words[0], str(path), *words[1:]], monkeypatch, capsys)
            if file == "sweep.json" and status == 2:
                assert err.startswith("error: sweep.json must be"), at
                assert len(err.splitlines()) == 1
                continue
            assert (status, err) == (0, ""), at
            rows = damage.run_rows(path)
            assert {s: rows[s] for s in others} == {s: before[s] for s in others}, at
            assert rows[trial.signature] == before[trial.signature] or rows[trial.signature]["state"] == "damaged", at
    status, _, err = said(["report", str(path)], monkeypatch, capsys)
    assert status == (2 if file == "sweep.json" else 0), err


@pytest.mark.parametrize("value", [True, [], {"torch": 1}, "torch", None])
def test_provenance_of_another_type_is_named_on_the_page(value: object, view: View) -> None:
    folder = view.sweep.trial_dir(view.sweep.trials[0])
    provenance(folder)
    changed(folder / "provenance.json", packages=value)
    lines = html_text.what_was_run(view)
    assert any("seed42: damaged: provenance.json: restore it" in line for line in lines)
    assert any("packages" in line for line in html_text.about(view, view.sweep.trials[0], "h"))


# The sweep's own command, and its workers.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def own(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["x.py", "--runs-dir", str(runs), *given(name, "local")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command.main(SPECS[name])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out + err


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("file", ["result.json", "claim/000001.json", "config.yaml", "checkpoints", "."])
def test_the_command_runs_what_is_not_damaged_and_returns_1(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = folder_of("sweep", tmp_path)
    spec = SPECS["sweep"]
    from sweeps.cli.plan import parse, plan

    sweep, _ = plan(spec, parse(spec, ["--runs-dir", str(tmp_path), *given("sweep", "local")]))
    broken = sweep.trial_dir(sweep.trials[0]) / file
    broken.parent.mkdir(parents=True)
    if file == "checkpoints":
        (tmp_path / "away").mkdir()
        broken.symlink_to(tmp_path / "away")
    elif file == ".":
        broken.write_text("x")
    else:
        broken.write_text("{")
    status, text = own("sweep", tmp_path, monkeypatch, capsys)
    assert status == 1, text
    assert "Traceback" not in text
    assert "seed42: damaged: " in text
    states = [row["state"] for row in damage.run_rows(path).values()]
    assert states == ["damaged", "completed"]
    # Repaired, the trial runs.
    broken.unlink()
    assert own("sweep", tmp_path, monkeypatch, capsys)[0] == 0
    assert [row["state"] for row in damage.run_rows(path).values()] == ["completed", "completed"]
    assert not list((tmp_path / "away").glob("*"))


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("digit", [0, 2, 7])
def test_a_wrong_digit_in_a_claim_is_no_endless_loop(digit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert work("sweep", tmp_path)() == 0
    trial = next(p for p in (folder_of("sweep", tmp_path) / "trials").iterdir())
    (trial / "result.json").unlink()
    changed(trial / "claim" / "000001.json", epoch=digit)
    status, text = own("sweep", tmp_path, monkeypatch, capsys)
    assert status == 1
    assert "claim/000001.json: restore it from a copy, or delete it and type the command again (epoch must be the number" in text
    (trial / "claim" / "000001.json").unlink()
    assert own("sweep", tmp_path, monkeypatch, capsys)[0] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("harm", sampled([b"{", b"", b'{"number": 1}', b"\xff", None], 2, "harms of a choice"))
def test_a_choice_that_cannot_be_read_costs_one_trial_of_a_search(
    harm: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert work("search", tmp_path)() == 0
    path = folder_of("search", tmp_path)
    choice = path / "points" / "000001.json"
    good = choice.read_bytes()
    choice.write_bytes(good.replace(b'"seed": 42', b'"seed": 43') if harm is None else harm)
    status, out, _ = said(["status", str(path)], monkeypatch, capsys)
    assert status == 0
    assert "1 damaged" in out
    assert "choice 1: damaged: points/000001.json: restore it" in out
    status, text = own("search", tmp_path, monkeypatch, capsys)
    assert status == 1, text
    assert "choice 1: damaged" in text
    choice.write_bytes(good)
    assert own("search", tmp_path, monkeypatch, capsys)[0] == 0


@pytest.mark.usefixtures("quick")
def test_a_gap_in_the_choices_of_a_search_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert work("search", tmp_path)() == 0
    path = folder_of("search", tmp_path)
    (path / "points" / "000002.json").write_bytes((path / "points" / "000001.json").read_bytes())
    (path / "points" / "000001.json").unlink()
    status, _, err = said(["status", str(path)], monkeypatch, capsys)
    assert status == 2
    assert "000001.json must be a file that this project wrote; got" in err
    assert "it is missing, while 000002.json is there: restore it from a copy" in err


@pytest.mark.usefixtures("quick")
def test_a_deleted_last_choice_is_told_by_the_folder_of_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert work("search", tmp_path)() == 0
    path = folder_of("search", tmp_path)
    (path / "points" / "000001.json").unlink()
    assert "run folders of no trial" in said(["status", str(path)], monkeypatch, capsys)[1]


def test_a_worker_passes_over_damaged_trials(tmp_path: Path) -> None:
    """Half done, or not begun: it claims the next one, and never dies of them."""
    found = made(tmp_path / "s", {}, seeds=1).sweep
    for trial in found.trials:
        found.run(trial).prepare(trial.config)
    with claims.claim(found.trial_dir(found.trials[0]), 1, "d", 0) or pytest.fail("taken"):
        pass
    (found.trial_dir(found.trials[0]) / "claim" / "000001.json").write_text("{")
    (found.trial_dir(found.trials[1]) / "config.yaml").write_text("seed: [")
    worker = View(Sweep.load(found.path), thorough=False)
    claimed = scheduler.next_claim(worker, "d")
    assert claimed is not None
    assert claimed[0].signature == found.trials[2].signature
    with claimed[1]:
        assert scheduler.next_claim(worker, "d") is None
    assert worker.damage(found.trials[0]).startswith("damaged: claim/000001.json: ")
    assert worker.damage(found.trials[1]).startswith("damaged: config.yaml: ")


# Files of a sweep.


def test_a_claim_is_read_by_its_name_and_its_types(tmp_path: Path) -> None:
    owned = claims.claim(tmp_path, 1, "d", 0, claims.SlurmStart("c", "7", 0, "n", 1.0, "/l", "/c"))
    assert owned is not None
    assert claims.history(tmp_path) == [owned.claim]
    path = tmp_path / "claim" / "000001.json"
    good = json.loads(path.read_text())
    good.pop(SEAL)
    assert Claim.from_dict({**good, "slurm": {**good["slurm"], "later": 1}}, 1) == owned.claim  # of another version
    for key, value in [("epoch", 2), ("epoch", True), ("step", "0"), ("driver", None), ("time", []), ("owner", []), ("slurm", [])]:
        changed(path, **{**good, key: value})
        with pytest.raises(DamagedError, match=key):
            claims.history(tmp_path)
    (tmp_path / "claim" / "2.json").write_text("x")  # no name that a claim has
    changed(path, **good)
    assert [c.attempt for c in claims.history(tmp_path)] == [1]


def test_a_submission_that_cannot_be_read_is_named_by_advice(view: View, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from jobs.cluster import ClusterProfile

    made_one = Submission(view.sweep.path, 1, "n", 1, 1, [], ClusterProfile("c"), "/code", claims.Process.me(), 1.0)
    assert made_one.create()
    assert Submission.load(made_one.path) == made_one
    for key, value in [("cluster", []), ("number", 2), ("after", "x"), ("writer", None), ("size", "1"), ("cluster", {"name": 3})]:
        original = made_one.path.read_bytes()
        changed(made_one.path, **{key: value})
        status, out, err = said(["advice", str(view.sweep.path)], monkeypatch, capsys)
        assert (status, err) == (0, "")
        assert out.startswith("damaged: submissions/000001.json: restore it from a copy"), key
        made_one.path.write_bytes(original)


def test_a_sweep_has_different_trials(view: View) -> None:
    path = view.sweep.path / "sweep.json"
    trials = json.loads(path.read_text())["trials"]
    for wrong in ([], [trials[0], trials[0]], [{**trials[0], "values": {"epochs": "4"}}], [{**trials[0], "values": {}}], [3], {"a": 1}):
        changed(path, trials=wrong)
        with pytest.raises(DamagedError):
            Sweep.load(view.sweep.path)
