"""The parts of the drill of a user's program: lines, live objects, causes, clocks, reports."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jobs.resuming.align import aligned
from jobs.resuming.causes import Cause, Group, common, differing, effects, folded, named, of_effects, smallest
from jobs.resuming.check import Disturbed, Findings
from jobs.resuming.command import CommandLine, Commands, Kill, _reports, words_of
from jobs.resuming.kinds import Kind
from jobs.resuming.live import Item, live_items
from jobs.resuming.outcome import Outcome, differences, measured_times
from jobs.resuming.own_files import ROOT
from jobs.resuming.report import text
from jobs.resuming.runs import ProgramError
from jobs.resuming.unsteady import causes
from jobs.resuming.watch import Moment


def lines(text: str) -> list[tuple[str, int]]:
    return [("train.py", ord(letter)) for letter in text]


def test_a_resumed_run_is_met_where_all_is_restored_and_nothing_is_trained() -> None:
    loop = "while-body-of-an-epoch"
    assert aligned(lines("s" + loop * 2), lines("restore" + loop * 3)) == (1, 7)
    assert aligned(lines("s" + loop * 2), lines("body!restore" + loop * 3)) == (1, 12)  # a function that both use
    assert aligned(lines("abcdef"), lines("uvwxyz")) is None


def test_a_run_that_skips_what_it_has_seen_is_met_after_that() -> None:
    after = "fifbatch-and-its-step"
    assert aligned(lines(after), lines("fic" * 4 + after)) == (0, 12)


def walked(**values: Any) -> dict[str, Item]:
    locals().update(values)
    return live_items([sys._getframe()], lambda file: True)


def test_kinds_are_found_by_what_objects_are_and_not_by_their_names() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = nn.Linear(2, 2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    box = {
        "a": net, "b": other, "c": sgd, "d": torch.optim.lr_scheduler.StepLR(sgd, 2), "e": torch.amp.GradScaler("cpu"),
        "f": np.random.default_rng(1), "g": random.Random(1), "h": torch.Generator(), "i": np.zeros(3), "j": 4,
    }  # fmt: skip
    found = {name.removeprefix("values['box']"): item.kind for name, item in walked(box=box).items()}
    wanted = {
        "['a'].0.weight": Kind.weights, "['a'].1.running_mean": Kind.statistics, "['b'].weight": Kind.average,
        "['c'].state": Kind.optimizer, "['c'].param_groups": Kind.rate, "['d']": Kind.scheduler, "['e']": Kind.scaler,
        "['f']": Kind.numpy, "['g']": Kind.python, "['h']": Kind.torch, "['i']": Kind.array, "['j']": Kind.value,
        "torch.get_rng_state()": Kind.torch,
    }  # fmt: skip
    assert {name: found.get(name) for name in wanted} == wanted


def test_a_generator_that_a_loader_holds_decides_the_order_of_the_data() -> None:
    draw = torch.Generator()
    loader = torch.utils.data.DataLoader([1, 2, 3], shuffle=True, generator=draw)  # type: ignore[arg-type]
    assert walked(both=[draw, loader])["values['both'][0]"].kind is Kind.order


def test_what_was_found_can_be_put_back() -> None:
    before = {"rng": np.random.default_rng(1), "array": np.ones(3), "number": 5}
    after = {"rng": np.random.default_rng(2), "array": np.zeros(3), "number": 6}
    good, bad = walked(box=before), walked(box=after)
    wrong = differing(good, bad)
    assert {item.kind for item in wrong} == {Kind.numpy, Kind.array, Kind.value}
    for item in wrong:
        assert item.put is not None
        item.put(good[item.name].value)
    assert after["number"] == 5
    assert after["array"].tolist() == [1, 1, 1]  # type: ignore[attr-defined]
    assert after["rng"].random() == np.random.default_rng(1).random()  # type: ignore[attr-defined]


def arrays(**values: Any) -> dict[str, Item]:
    return {name: Item(name, Kind.array, value) for name, value in values.items()}


def test_an_array_is_an_average_or_moments_or_an_order() -> None:
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(4, 5))
    before = arrays(w=weights, mean=0.6 * weights + 0.1, push=draw.normal(size=(4, 5)), rows=np.array([2, 0, 1]), alone=np.ones(7))
    after = arrays(w=weights, mean=weights, push=0 * weights, rows=np.array([0, 1, 2]), alone=np.zeros(7))
    assert {name: named(Kind.array, [name], before, after) for name in ("mean", "push", "rows", "alone")} == {
        "mean": Kind.average,
        "push": Kind.optimizer,
        "rows": Kind.order,
        "alone": Kind.array,
    }


def test_only_what_matters_is_kept_of_all_that_differs() -> None:
    groups = [Group(kind, f"{kind.name}{n}") for kind in (Kind.optimizer, Kind.torch, Kind.value) for n in range(3)]
    needed = {"optimizer1", "value2"}
    assert {g.root for g in smallest(groups, lambda chosen: needed <= {g.root for g in chosen}) or []} == needed
    assert smallest(groups, lambda chosen: False) is None


@pytest.mark.parametrize(
    ("follows", "kind"),
    [
        ("size=value images=array w=weights", Kind.order),
        ("size=value early=array w=weights", Kind.sampler),
        ("decay=value mean=average", Kind.average),
        ("number=value rate=value w=weights", Kind.scheduler),
        ("number=value groups=rate w=weights", Kind.scheduler),
        ("bad=value", Kind.value),
        ("bad=value norm=statistics w=weights", Kind.value),
        ("bad=value saved=array", Kind.value),
        ("separate=value w=weights", Kind.value),
        ("w=weights mean=average", Kind.weights),
        ("images=array", Kind.order),
    ],
)
def test_a_number_is_called_by_what_follows_from_it(follows: str, kind: Kind) -> None:
    items = [Item(name, Kind[of], 0) for name, of in (pair.split("=") for pair in follows.split())]
    assert of_effects(items, lambda item: item.name == "early", lambda item: item.name == "saved") is kind


def test_what_follows_is_in_order_and_without_what_is_on_the_way_to_the_loss() -> None:
    def look(where: int, **values: Any) -> dict[str, Any]:
        items = {n: Item(n, Kind.weights if n == "w" else Kind.value, v, computed=n == "hidden") for n, v in values.items()}
        return {"where": f"train.py:{where}", "items": items}

    before = [look(1, seen=3, w=1, late=1), look(2, seen=3, size=9, w=1, late=1), look(3, seen=3, size=9, w=2, hidden=1, late=1)]
    after = [look(1, seen=0, w=1, late=1), look(2, seen=0, size=5, w=1, late=1), look(3, seen=0, size=5, w=3, hidden=2, late=1)]
    assert [item.name for item in effects([*before, look(4, late=1)], [*after, look(5, late=2)])] == ["size", "w"]
    tensor = torch.ones(2, requires_grad=True) * 2
    assert live_items([sys._getframe()], lambda file: True)["tensor"].computed, tensor


def test_a_process_that_the_program_forks_is_not_the_one_that_is_watched(tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(_LOADS)
    code = f"""
import os
from jobs.resuming import watch
import loads
with open({str(tmp_path / "events")!r}, "a") as out:
    kill = watch.Moment(watch.START, 5)
    watched = watch.install(watch.Plan(kill=kill), out)
    loads.work(lambda: watched.begin(watch.START, 100))
"""
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "the other process ended with 0\n"), done.stderr


_LOADS = """
import os
def work(begin):
    begin()
    child = os.fork()
    if not child:
        a = 1
        b = 2
        c = 3
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    os.write(1, f"the other process ended with {status}\\n".encode())
    x = 1
    x = 2
    x = 3
"""


def test_what_belongs_to_another_cause_is_not_named_twice() -> None:
    found = [Cause(Kind.optimizer, "t.sgd.state", "", True), Cause(Kind.scheduler, "t.sgd.param_groups", "", True)]
    found += [Cause(Kind.average, "mean.0", "", True), Cause(Kind.statistics, "mean.1", "", True)]
    assert [c.name for c in folded(found)] == ["t.sgd.state", "mean.0"]
    assert common(["net.1.running_mean", "net.1.running_var"]) == "net.1"


def test_a_value_that_follows_the_clock_is_told_from_one_that_depends_on_it() -> None:
    normal = Outcome(metrics={1: {"took": 0.5, "rate": 200.0, "loss": 1.0}, 2: {"took": 1.1, "rate": 190.0, "loss": 0.5}})
    hurried = Outcome(metrics={1: {"took": 480.0, "rate": 0.21, "loss": 1.0}, 2: {"took": 1210.0, "rate": 0.18, "loss": 0.4}})
    assert measured_times(normal, hurried) == {"took", "rate"}
    [wrong] = differences(hurried, normal, measured_times(normal, hurried))
    assert (wrong.step, wrong.name, wrong.text) == (2, "loss", "loss, reported at 2: 0.4 instead of 0.5 (difference 0.1)")


_DATED = """
import datetime
from datetime import date, datetime as a
def ages():
    from datetime import datetime as b
    known = datetime.datetime(2000, 1, 1)
    assert isinstance(known, a) and isinstance(known, date)
    return [(when - known).days for when in (datetime.datetime.now(), a.today(), b.utcnow())] + [(date.today() - known.date()).days]
"""


def test_another_clock_is_the_program_s_and_not_that_of_compiled_libraries(tmp_path: Path) -> None:
    (tmp_path / "dated.py").write_text(_DATED)
    code = """
from jobs.resuming import conditions
conditions.apply({"clock": 4e9})
import dated, pandas
assert min(dated.ages()) > 35_000, dated.ages()
assert str(pandas.Timestamp("2001-01-01") + pandas.Timedelta(days=1)) == "2001-01-02 00:00:00"
"""
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("depends", "kinds"),
    [("clock", [Kind.clock]), ("numpy", [Kind.unseeded_numpy]), ("hashing", [Kind.hashing]), ("nothing", [Kind.chance])],
)
def test_one_condition_at_a_time_says_why_two_undisturbed_runs_differ(depends: str, kinds: list[Kind]) -> None:
    def under(hashing: int, conditions: Any) -> Outcome:
        return Outcome(metrics={1: {"loss": float({**conditions, "hashing": hashing}.get(depends, 0))}})

    [first] = differences(Outcome(metrics={1: {"loss": 1.0}}), Outcome(metrics={1: {"loss": 2.0}}))
    assert [u.kind for u in causes(under, frozenset(), first)] == kinds


def test_a_report_says_what_where_how_large_and_what_to_do() -> None:
    different = differences(Outcome(metrics={3: {"loss": 0.5}}), Outcome(metrics={3: {"loss": 0.25}}))
    found = Findings(
        4, 4, [Disturbed(Moment(2, 7), False, different)], where="/x/train.py:30", restored_at="/x/train.py:9", saved_at="/x/train.py:50"
    )
    found.causes = [Cause(Kind.optimizer, "sgd.state", "empty", True)]
    shown = text(found)
    assert not found.holds
    assert "FORGOTTEN: optimizer moments: sgd.state (empty)" in shown
    assert "loss, reported at 3: 0.5 instead of 0.25 (difference 0.25); run killed after 2" in shown
    assert "read at /x/train.py:9, and saved at /x/train.py:50" in shown
    assert "fix       Save sgd.state with the model" in shown


def test_a_command_must_have_a_value_for_each_key() -> None:
    assert words_of("python t.py --lr {lr} {run_dir}", ["lr=0.1"]) == (["python", "t.py", "--lr", "{lr}", "{run_dir}"], {"lr": "0.1"})
    with pytest.raises(ValueError, match="got none for"):
        words_of("t {lr}", [])
    with pytest.raises(ValueError, match="decay= must be a"):
        words_of("t {lr}", ["lr=1", "decay=2"])


def test_a_command_s_reports_are_read_as_a_sweep_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "reports.jsonl"
    file.write_text('{"epoch": 1, "loss": 3}\n\n{"epoch": 1, "step": 9, "accuracy": 5}\n{"step": 2, "loss": 1}\n{"epoch": 3, "lo')
    assert _reports(file, "epoch") == {1: {"loss": 3, "accuracy": 5}, 2: {"loss": 1}}
    file.write_text('{"epoch": [1], "loss": 3}\n')
    with pytest.raises(ProgramError, match=r'^each line of SWEEP_REPORT must be a JSON object with a whole "epoch" or "step"'):
        _reports(file, "epoch")


def _commands(folder: Path, script: str, grace_seconds: float = 9.0) -> Commands:
    line = CommandLine(["sh", "-c", script, "sh", "{run_dir}"], grace_seconds=grace_seconds)
    return Commands(folder, line, folder, 30.0, len(list(folder.iterdir())))


_REPORT = 'echo "{{\\"epoch\\": $n, \\"loss\\": $n}}" >> "$SWEEP_REPORT"'


def test_a_command_that_outlives_its_grace_is_killed_and_that_is_said(tmp_path: Path) -> None:
    commands = _commands(tmp_path, f"trap '' TERM; n=1; {_REPORT}; n=2; {_REPORT}; sleep 30", grace_seconds=0.2)
    began = time.monotonic()
    stopped = commands.start("stopped", tmp_path, Kill(1, 0.0, True))
    assert time.monotonic() - began < 20
    assert (stopped.disturbed, stopped.outlived, stopped.outcome.ended) == (True, True, "signal 9")
    found = Findings(reports=2, disturbed=[Disturbed(Moment(1, 0), True, outlived_seconds=0.2)])
    assert text(found).splitlines()[-1] == "note: the command did not end within 0.2 s of SIGTERM: it was killed, as in a sweep"
    ends = _commands(tmp_path, f"n=1; {_REPORT}; sleep 30", grace_seconds=5).start("ends", tmp_path, Kill(1, 0.0, True))
    assert (ends.disturbed, ends.outlived, ends.outcome.ended) == (True, False, "signal 15")


@pytest.mark.parametrize(
    ("step", "ended"),
    [
        ("exit 75", "completed"),
        ("kill -9 $$", "completed"),
        ("exit 3", "the command must end with status 0; got exit 3: no output"),
        ("[ $n = 2 ] && rm $1/n; exit 75", "the command must gain an epoch before it stops by itself; got exit 75 twice at 2: no output"),
    ],
)
def test_a_command_that_ends_by_itself_is_judged_as_in_a_sweep(step: str, ended: str, tmp_path: Path) -> None:
    script = f"n=$(cat $1/n 2>/dev/null); n=$((n + 1)); [ $n -gt 3 ] && exit 0; {_REPORT}; echo $n > $1/n; {step}"
    found = _commands(tmp_path, script).start("undisturbed", tmp_path)
    assert (found.outcome.ended, found.disturbed) == (ended, False)
    if ended == "completed":
        assert found.outcome.metrics == {n: {"loss": n} for n in (1, 2, 3)}
