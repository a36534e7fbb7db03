"""A trial gets its number once, when it enters the folder, and a name by one function."""

import json
import threading
from pathlib import Path

import pytest

from cnnjepa.run.files import BY_FOLDERS, PLACE, sealed_json
from sweeps.spec.names import number_and_seed, slug, trial_name
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import numbers
from sweeps.state.folder import Sweep
from tests.support.searched import run_to_the_end, searched


def planned(folder: Path, *signatures: str) -> Sweep:
    trials = [Trial(i, f"depth {i}", 42, {"epochs": 4}, name) for i, name in enumerate(signatures)]
    made = Sweep(folder, "x", "?", ScaleName.smoke, "o", [], {}, trials)
    numbers.renumber(folder, made.trials)
    return made


def numbered(sweep: Sweep) -> dict[str, int]:
    return {t.signature: t.number for t in sweep.trials}


def written(folder: Path, *signatures: str) -> dict[str, int]:
    made = planned(folder, *signatures)
    before = numbered(made)
    made.write()
    assert numbered(made) == before == numbered(Sweep.load(folder))
    return before


def test_a_trial_keeps_its_number_when_others_come_and_go(tmp_path: Path) -> None:
    assert written(tmp_path, "a", "b", "c") == {"a": 0, "b": 1, "c": 2}
    assert written(tmp_path, "new", "c", "a") == {"new": 3, "c": 2, "a": 0}  # b is withdrawn
    assert written(tmp_path, "a", "later", "b") == {"a": 0, "later": 4, "b": 1}  # and comes back
    assert len(list((tmp_path / "numbers").iterdir())) == 3
    written(tmp_path, "b", "new")
    assert len(list((tmp_path / "numbers").iterdir())) == 3  # nothing was new


def test_a_folder_of_before_keeps_the_numbers_that_it_showed(tmp_path: Path) -> None:
    planned(tmp_path, "a", "b", "c").write()
    for file in (tmp_path / "numbers").iterdir():
        file.unlink()
    (tmp_path / "numbers").rmdir()
    assert numbered(Sweep.load(tmp_path)) == {"a": 0, "b": 1, "c": 2}
    assert numbered(planned(tmp_path, "new", "c")) == {"new": 3, "c": 2}
    assert not (tmp_path / "numbers").exists()  # reading writes nothing
    assert written(tmp_path, "new", "c") == {"new": 3, "c": 2}
    assert written(tmp_path, "newer", "b") == {"newer": 4, "b": 1}


@pytest.mark.parametrize("way", ["links", BY_FOLDERS])
def test_several_commands_at_once_give_no_number_twice(tmp_path: Path, way: str) -> None:
    (tmp_path / PLACE).write_text(sealed_json({"path": str(tmp_path), "exclusive": way}))
    lists = [[*"abc", f"own{i}", f"own{i}b"] for i in range(6)]
    begin = threading.Barrier(len(lists))

    def command(names: list[str]) -> None:
        trials = [Trial(i, "", 42, {"epochs": 4}, name) for i, name in enumerate(names)]
        begin.wait()
        numbers.give(tmp_path, trials)
        found.append({t.signature: t.number for t in trials})

    found: list[dict[str, int]] = []
    threads = [threading.Thread(target=command, args=(names,)) for names in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = {name: number for one in found for name, number in one.items()}
    assert all(together[name] == number for one in found for name, number in one.items())
    assert sorted(together.values()) == list(range(15))


def test_a_batch_that_is_not_as_it_was_written_is_named_in_one_line(tmp_path: Path) -> None:
    planned(tmp_path, "a", "b").write()
    file = tmp_path / "numbers" / "000000.json"
    file.write_text(json.dumps({"numbers": {"a": 0, "b": -1}}))
    with pytest.raises(ValueError, match=r"000000.json must be a file that this project wrote; .*given once, from 0; got -1"):
        Sweep.load(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"000000.json must be .*restore it from a copy, or delete it"):
        Sweep.load(tmp_path)
    file.unlink()
    assert numbered(Sweep.load(tmp_path)) == {"a": 0, "b": 1}  # as sweep.json has them


def test_a_search_keeps_its_own_numbers(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=3)
    run_to_the_end(made, lambda trial: 50.0)
    assert [t.number for t in Sweep.load(made.path).trials] == [0, 1, 2]
    assert not (made.path / "numbers").exists()
    assert written(made.path, "a", "b") == {"a": 3, "b": 4}  # a grid in its folder


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("depth 2", "depth2"),
        ("lr 0.003, multi_block, depth 3", "lr0.003-multi_block-depth3"),
        ("#12 lr 1e-05, wd 0.1", "lr1e-05-wd0.1"),
        ("baseline: unchanged", "baseline-unchanged"),
        ("lr -1, use_bn True", "lr-1-use_bn-True"),
        ("mask ratio 0.6", "mask-ratio0.6"),
        ("../../etc/passwd; rm $HOME", "etc-passwd-rm-HOME"),
        ("Größe 3, naïve", "Groe3-naive"),
        ("学習率", ""),
        ("x" * 100, "x" * 48),
        ("...", ""),
    ],
)
def test_the_words_of_a_label_are_safe_in_a_name(label: str, expected: str) -> None:
    assert slug(label) == expected
    name = trial_name(3, label, 43)
    assert name == ("03-" + expected + "-seed43" if expected else "03-seed43")
    assert number_and_seed(name) == (3, 43)


def test_a_name_has_a_number_of_two_digits_or_more() -> None:
    assert [trial_name(n, "depth 2", 42) for n in (7, 123)] == ["07-depth2-seed42", "123-depth2-seed42"]
    assert [number_and_seed(text) for text in ("7", "depth2-seed42", "07-depth2", "")] == [None] * 4
