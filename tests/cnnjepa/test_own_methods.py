"""Methods of other packages are found by entry points; what is no method is one line that names its package's entry."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cnnjepa import config
from tests.support.documented import example
from tests.support.wheel import offer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sys.path, whose packages nobody has looked for yet."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for known in (config._own_methods, config._own_method):
        known.cache_clear()
    yield tmp_path
    for known in (config._own_methods, config._own_method):
        known.cache_clear()


def test_a_method_of_another_package_is_one_like_the_others(folder: Path) -> None:
    (folder / "theirs_1.py").write_text(example("adding-a-method.md", "python").replace("simsiam", "theirs"))
    offer(folder, "theirs", cnnjepa_methods={"theirs": "theirs_1"})
    assert "theirs" in config.method_names()
    assert config.method_module("theirs").Config().name == "theirs"
    assert config.optimizer_presets()["theirs"].lr == 0.001
    assert config.MethodConfig.kind_of({"name": "theirs"}) is config.method_module("theirs").Config


@pytest.mark.parametrize(
    ("name", "module", "text", "says"),
    [
        ("byol", "theirs_2", "", "must have a name of its own; got byol = theirs_2 beside cnnjepa.methods.byol"),
        (
            "theirs",
            "theirs_3",
            "import no_such_package\n",
            "that can be imported; got ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("theirs", "theirs_4", "class Config: pass\nclass Method: pass\n", "with Config, a MethodConfig, and Method, a BaseMethod; got "),
        (
            "theirs",
            "theirs_5",
            "from cnnjepa.methods.random import Config, Method\n",
            "whose Config has name: str = 'theirs'; got 'random'",
        ),
    ],
)
def test_what_is_no_method_is_one_line(name: str, module: str, text: str, says: str, folder: Path) -> None:
    (folder / f"{module}.py").write_text(text)
    offer(folder, "theirs", cnnjepa_methods={name: module})
    with pytest.raises(ValueError, match="entry point") as said:
        config.optimizer_presets()
    assert says in str(said.value)
    assert module in str(said.value)
    assert "\n" not in str(said.value)


def test_an_unknown_method_is_one_line_that_lists_theirs_too(folder: Path) -> None:
    offer(folder, "theirs", cnnjepa_methods={"theirs": "nothing"})
    with pytest.raises(ValueError, match=r"method must be one of .*theirs.*; got none_such$"):
        config.method_module("none_such")
