import ast
from pathlib import Path

import pytest

from tests.support.forgetting import BUGS, CORRECT, Program


def test_every_bug_can_be_planted_once_and_is_a_program(tmp_path: Path) -> None:
    assert len(BUGS) >= 24
    assert len(CORRECT) >= 10
    assert len({p.name for p in [*BUGS, *CORRECT]}) == len(BUGS) + len(CORRECT)
    for number, program in enumerate([*BUGS, *CORRECT]):
        (folder := tmp_path / str(number)).mkdir()
        program.write(folder)
        for path in folder.rglob("*.py"):
            ast.parse(path.read_text())


def test_a_text_that_no_longer_occurs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        Program("lost", "teacher", (("no such text", ""),)).write(tmp_path)
