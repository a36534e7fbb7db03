"""A packed set that is not as it was packed stops a run before it starts, and a submission before it is made."""

from pathlib import Path

import pytest

from cnnjepa.data_config import DataConfig, DatasetName
from jobs.preflight import check_data
from tests.jobs.test_bad_input import OK, call_pretrain
from tests.support.images import image_tree
from tests.support.packing import damage, run
from tests.support.tiny import tiny_config


@pytest.mark.parametrize("how", ["truncated", "missing", "another file", "manifest", "shrunk"])
def test_damage_is_one_line_and_status_2(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--short-side", "30"] if how == "shrunk" else []
    folder = tmp_path / "packed"
    assert run(image_tree(tmp_path / "tree", ["cat", "dog"], images=10), folder, "--images-per-file", 10, *options).returncode == 0
    message = "data.short_side must be 30, as " if how == "shrunk" else damage(folder, how)
    monkeypatch.chdir(tmp_path)
    data = ["data=imagefolder", f"data.root={folder}", "data.image_size=32", "global_batch_size=8", "micro_batch_size=8"]
    assert call_pretrain([*OK, f"run_dir={tmp_path / 'run'}", *data], monkeypatch) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")
    (finding,) = check_data(tiny_config(data=DataConfig(DatasetName.imagefolder, root=str(folder))))
    assert (finding.level, finding.said) == ("problem", line.removeprefix("error: "))
