"""Values read from files have the types that their classes declare, or one line says which does not."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run.files import SEAL, DamagedError, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.records import record_of
from cnnjepa.run.typed import build, checked


class Colour(Enum):
    red = "red"


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    share: float
    inner: Inner
    colour: Colour = Colour.red
    counts: dict[str, int] = field(default_factory=dict)
    options: Sequence[str | int | float | bool] = ()
    when: tuple[str, Sequence[int]] | None = None
    path: Path = Path()


GOOD = {
    "name": "a",
    "share": 1,
    "inner": {"size": 2},
    "colour": "red",
    "counts": {"x": 1},
    "options": ["a", 1, 1.5, True],
    "when": ["k", [1]],
}


def test_a_class_is_built_with_the_types_that_it_declares() -> None:
    made = build(Outer, {**GOOD, "path": "/a"})
    assert made == Outer("a", 1.0, Inner(2), Colour.red, {"x": 1}, ("a", 1, 1.5, True), ("k", (1,)), Path("/a"))
    assert type(made.share) is float
    assert [type(option) for option in made.options] == [str, int, float, bool]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", 3, "name must be of type str; got '3', a int"),
        ("name", None, "name must be"),
        ("share", [], "share must be of type float; got '[]', a list"),
        ("share", True, "share must be"),
        ("share", "1", "share must be"),
        ("share", 10**400, "share must be"),
        ("inner", [], "inner must be an object; got a list"),
        ("inner", {"size": 1.5}, "inner.size must be of type int"),
        ("inner", {"size": True}, "inner.size must be"),
        ("inner", {"sise": 1}, "inner.sise must be a key of Inner"),
        ("inner", {}, "inner.size must be given"),
        ("colour", "blue", "colour must be one of red; got 'blue'"),
        ("colour", [], "colour must be one of red"),
        ("counts", {"x": "1"}, "counts.x must be"),
        ("counts", [], "counts must be"),
        ("options", "abc", "options must be"),
        ("options", [[]], "options[0] must be"),
        ("when", ["k"], "when must be"),
        ("when", ["k", 1], "when[1] must be"),
        ("when", {}, "when must be"),
        ("nane", 1, "nane must be a key of Outer"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(key: str, value: Any, said: str) -> None:
    with pytest.raises(TypeError) as error:
        build(Outer, {**GOOD, key: value})
    assert said in str(error.value)


def test_fields_that_are_given_are_no_keys() -> None:
    assert build(Inner, {}, size=3) == Inner(3)
    with pytest.raises(TypeError, match="size must be a key"):
        build(Inner, {"size": 1}, size=3)
    with pytest.raises(TypeError):
        checked(list[int], {"a": 1}, "x")


RESULT = RunResult(
    RunStatus.completed, metrics={"knn": 71.5}, missing={"linear": "é: GONE"}, probes={"2": {"knn": 3.25}}, step=7, seconds=2.5
)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("device_hours", v) for v in ([], {}, "1", None, True)],
        *[("metrics", v) for v in ([], {"knn": "71"}, {"knn": None}, 3)],
        *[("probes", v) for v in ({"2": []}, {"2": {"knn": True}})],
        *[("step", v) for v in (1.5, "7", None)],
        *[("status", v) for v in ("complete", 1, None, [])],
        *[("missing", v) for v in (True, {"linear": 1})],
        ("energy_kwh", "1"),
        ("devike_hours", 1.0),
    ],
)
def test_a_result_with_a_value_of_another_type_is_damaged(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({**RESULT.to_dict(), key: value}))
    with pytest.raises(DamagedError, match=rf"result.json must be a file that this project wrote; got .*{key}.* (must|got)"):
        RunFolder(tmp_path).result()


def test_no_byte_of_a_sealed_file_changes_what_is_read_unnoticed(tmp_path: Path) -> None:
    """Each byte is flipped in one of its bits."""
    path = tmp_path / "result.json"
    assert RunFolder(tmp_path).write_result(RESULT)
    data, draw, said = path.read_bytes(), random.Random(1), []
    assert RunFolder(tmp_path).result() == RESULT
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        try:
            assert RunFolder(tmp_path).result() == RESULT, at  # a space became a line break
        except DamagedError as error:
            said.append(str(error))
    assert len(said) > 0.8 * len(data)
    assert {len(text.splitlines()) for text in said} == {1}
    for at in range(len(data) - 1):
        path.write_bytes(data[:at])
        with pytest.raises(DamagedError):
            RunFolder(tmp_path).result()


def test_a_file_without_a_seal_is_read_as_version_0_1_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, sealed_json({"b": [1, 2.0], "a": {"2": None, "10": "é"}}))
    assert SEAL in json.loads(path.read_text())
    assert read_json(path) == {"b": [1, 2.0], "a": {"2": None, "10": "é"}}
    path.write_text('{"b": 1}')
    assert read_json(path) == {"b": 1}
    path.write_text('{"b": 1, "sha256": ""}')
    with pytest.raises(DamagedError, match="checksum"):
        read_json(path)


def test_a_seal_covers_keys_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(sealed_json({"a": {9: 1, 10: 2}}))
    assert read_json(path) == {"a": {"9": 1, "10": 2}}


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": [-Infinity]}'])
def test_a_number_that_is_not_finite_is_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DamagedError, match="not a finite number"):
        read_json(tmp_path / "x.json")


def test_whatever_goes_wrong_with_a_file_names_it_and_what_to_do(tmp_path: Path) -> None:
    for error in (KeyError("x"), TypeError("x"), ValueError("x\ny"), OverflowError("x"), OSError(13, "no access")):
        with pytest.raises(DamagedError) as found, reading(tmp_path / "x.json"):
            raise error
        assert str(tmp_path / "x.json") in str(found.value)
        assert str(found.value).endswith(found.value.remedy)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "step", "step": 1, "epoch": "x"}',
        b'{"kind": "step", "step": 1.5, "epoch": 1.0}',
        b'{"kind": "step", "step": true, "epoch": 1.0}',
        b'{"kind": [], "step": 1, "epoch": 1.0}',
        b'{"kind": "step", "step": 1, "epoch": NaN}',
        b'{"kind": "step", "step": 1, "epoch": 1e999}',
        b'{"kind": "step", "step": 1, "epoch": 1.0, "loss": "x"}',
        b'{"kind": "probe", "step": 1, "epoch": 1.0, "knn": []}',
        b'{"kind": "step", "step": 1}',
        b"[" * 100_000,
        b"\xff",
        b"17",
    ],
)
def test_a_record_of_another_shape_is_no_record(line: bytes) -> None:
    assert record_of(line) is None


def test_a_record_may_lack_values_and_hold_words_where_none_are_read() -> None:
    assert record_of(b'{"kind": "step", "step": 1, "epoch": 1, "loss": null, "amp": true}') is not None
    assert record_of(b'{"kind": "note", "step": 1, "epoch": 1.0, "said": "x"}') is not None
