"""A trial gets its number once, when it enters the folder, and a name by one function."""

import json
import threading
from pathlib import Path

import pytest

from cnnjepa.run.files import BY_FOLDERS, PLACE, sealed_json
from jobs.trial_names import number_and_seed, slug, trial_name
from jobs.trials import Listed, find, listed
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
    made.write()
    assert numbered(made) == numbered(planned(folder, *signatures)) == numbered(Sweep.load(folder))
    return numbered(made)


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
    assert [t.number for t in listed(tmp_path)] == [0, 1, 2]
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


def test_a_command_that_is_overtaken_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, overtaking = numbers.given_numbers, [planned(tmp_path, "fast", "both")]

    def reads(written: list[Path]) -> dict[str, int]:
        found = read(written)
        if overtaking:
            numbers.give(tmp_path, overtaking.pop().trials)
        return found

    monkeypatch.setattr(numbers, "given_numbers", reads)
    assert written(tmp_path, "both", "slow") == {"both": 1, "slow": 2}


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
    found = Sweep.load(made.path).trials
    assert [t.number for t in found] == [0, 1, 2]
    assert [(t.number, t.name, t.signature) for t in listed(made.path)] == [(t.number, t.name, t.signature) for t in found]
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
        (", ".join(f"key{i} 0.12345" for i in range(9)), "key0-0.12345-key1-0.12345-key2-0.12345"),
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


TRIALS = [
    Listed(0, "depth 1", 42, "ab12000000000000", [], None),
    Listed(1, "depth 2", 42, "ab34000000000000", [], None),
    Listed(12, "depth 1", 43, "1200000000000000", [], None),
    Listed(3, "kernel 5, depth 2", 43, "0300000000000003", [], None),
]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("1", 1),
        ("01", 1),
        ("12", 12),  # a number, and the start of its run ID
        ("120", 12),  # no number, but the start of a run ID
        ("ab34", 1),
        ("0300000000000003", 3),
        ("03-kernel5-depth2-seed43", 3),
        ("03-as-it-was-called-once-seed43", 3),
        ("depth 1/43", 12),
    ],
)
def test_a_trial_is_found_by_all_that_it_is_called(name: str, number: int) -> None:
    assert find(TRIALS, name).number == number


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ab", "got ab, which may be 00-depth1-seed42, 01-depth2-seed42$"),
        ("7", "got 7, which names none of 4 trials, numbered from 0 to 12$"),
        ("depth2-seed4", "which names none of .*; the nearest: 01-depth2-seed42, "),
        ("01-depth2-seed43", "names none"),
        ("", "names none"),
    ],
)
def test_what_means_no_trial_or_several_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^TRIAL must name one trial by its number, .*{said}"):
        find(TRIALS, name)
