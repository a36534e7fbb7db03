"""What happens when a user's images change under a run: between planning and start, before a resume, and after its end."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder, RunStatus
from jobs.cluster import JobSpec
from jobs.config import compose_job
from jobs.planned import planned
from jobs.run import run_job
from tests.support.documented import ROOT
from tests.support.images import image_tree, picture
from tests.support.packing import run as pack
from tests.support.sample import sampled

PAGE = ROOT / "docs" / "reference" / "changed-images.md"
SMALL = [
    "encoder.width=8",
    "data.image_size=32",
    "epochs=2",
    "optimizer.warmup_epochs=0",
    "global_batch_size=8",
    "micro_batch_size=8",
    "probes.names=[collapse]",
    "data.holdout_fraction=0.2",
    "log.tensorboard=false",
    "checkpoint.every_minutes=0",
]


def _in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _equal_size(path: Path) -> None:
    other = path.with_suffix(".tmp")
    picture(40, 36, seed=77).save(other, "JPEG", quality=30)
    data = other.read_bytes()
    other.unlink()
    size = path.stat().st_size
    assert len(data) < size
    _in_place(path, data + bytes(size - len(data)))


def _again(tree: Path) -> None:
    for path in sorted(tree.rglob("*.jpg"), reverse=True):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)


# Change -> what it does to the tree; the folder that the command names afterwards, if it is another one.
CHANGES: dict[str, Callable[[Path], Path | None]] = {
    "an image is added": lambda tree: picture().save(tree / "train" / "cat" / "99.jpg"),
    "an image is removed": lambda tree: (tree / "train" / "cat" / "3.jpg").unlink(),
    "a validation image is removed": lambda tree: (tree / "val" / "cat" / "3.jpg").unlink(),
    "an image is replaced by one of another size": lambda tree: picture(50, 50).save(tree / "train" / "dog" / "3.jpg"),
    "an image is replaced by one of equal size": lambda tree: _equal_size(tree / "train" / "dog" / "3.jpg"),
    "the same, with `data.verify=full`": lambda tree: _equal_size(tree / "train" / "dog" / "3.jpg"),
    "an image is moved to another class": lambda tree: (
        (tree / "train" / "cat" / "3.jpg").rename(tree / "train" / "dog" / "33.jpg") and None
    ),
    "the files are rewritten in another order": _again,
    "the folder is moved": lambda tree: tree.rename(tree.with_name("moved")),
    "the set is packed as it came": lambda tree: _packed(tree),
    "the set is packed and staged": lambda tree: _packed(tree),
    "the set is packed and shrunk": lambda tree: _packed(tree, "--short-side", 20),
}
WHEN = ("before the start", "before a resume", "after the end")
SAME, OTHER, REFUSED, UNSEEN = "the same run", "a new run", "refused", "not noticed"
EXPECTED = {
    **dict.fromkeys(CHANGES, (REFUSED, REFUSED, OTHER)),
    "an image is replaced by one of equal size": (UNSEEN,) * 3,
    **dict.fromkeys(["the files are rewritten in another order", "the folder is moved"], (SAME,) * 3),
    **dict.fromkeys(["the set is packed as it came", "the set is packed and staged"], (SAME,) * 3),
    "the set is packed and shrunk": (OTHER,) * 3,
}
CASES = [pytest.param(change, when, id=f"{change}, {when}") for change in CHANGES for when in WHEN]


def _packed(tree: Path, *more: object) -> Path:
    target = tree.with_name("packed")
    assert pack(tree, target, *more).returncode == 0
    return target


def job(root: Path, change: str, changed: bool = False) -> JobSpec:
    more = ["data.verify=full"] if "verify" in change else []
    if changed and "staged" in change:
        more.append(f"local_scratch={root.parent}")
    if changed and "shrunk" in change:
        more += ["data.short_side=20", "data.jpeg_quality=95"]
    return compose_job([*SMALL, "data=imagefolder", f"data.root={root}", f"runs_dir={root.parent / 'runs'}", *more])


def outcome(change: str, when: str, tmp_path: Path) -> str:
    """Train a little on a tree, change it, type the command again (or let the planned job start), and say what happens."""
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=20)
    first, _ = planned(job(tree, change))
    if when == "before a resume":
        looks = iter([False, False, False, True])
        assert run_job(first, lambda: next(looks, True)) is None
    elif when == "after the end":
        assert run_job(first) is not None
    for note in (tmp_path / "cache").rglob("listings/*"):
        os.utime(note, (0, 0))  # the job has waited in a queue
    root = CHANGES[change](tree) or tree
    now = job(root, change, changed=True)
    if when == "before the start":
        # A job that was queued: its configuration is fixed; only the folder may be another one now.
        data = replace(now.train.data, fingerprint=first.train.data.fingerprint)
        queued = replace(now, train=replace(now.train, data=data), run_dir=first.run_dir)
        if "shrunk" in change:  # its keys belong to the run
            return OTHER if planned(now)[0].run_dir != first.run_dir else SAME
        result = run_job(queued)
        assert result is not None
        if result.status is RunStatus.failed:
            assert "data.root must hold the images that the run was planned with, 40 training and 40 test images" in result.cause
            return REFUSED
    else:
        again, lines, refused = now, [""], ""
        try:
            again, lines = planned(now)
        except ValueError as error:
            refused = str(error)
        if refused:
            assert "data.root must hold the images that" in refused
            assert "40 training and 40 test images" in refused
            assert "start_again=true" in refused
            assert planned(replace(now, start_again=True))[0].run_dir != first.run_dir
            return REFUSED
        if again.run_dir != first.run_dir:
            assert "shrunk" in change or lines[-1].startswith("this is a new run on ")
            return OTHER
        result = run_job(again)
        assert result is not None
        assert result.resumes == (when == "before a resume")
    assert RunFolder(first.run_dir).result() is not None
    return UNSEEN if "equal" in change or "verify" in change else SAME


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(("change", "when"), sampled(CASES, 5, "changes of images"))
def test_a_change_of_the_images(change: str, when: str, tmp_path: Path) -> None:
    assert outcome(change, when, tmp_path) == EXPECTED[change][WHEN.index(when)]


def test_the_page_lists_what_each_change_does() -> None:
    lines = [f"| what changes | {' | '.join(WHEN)} |", "|---" * 4 + "|"]
    lines += [f"| {change} | {' | '.join(EXPECTED[change])} |" for change in CHANGES]
    assert "\n".join(lines) in PAGE.read_text()


def test_a_run_that_was_begun_anew_goes_on_although_an_older_one_is_unfinished(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=20)
    first, _ = planned(job(tree, ""))
    looks = iter([False, True])
    assert run_job(first, lambda: next(looks, True)) is None
    CHANGES["an image is added"](tree)
    second, (line,) = planned(replace(job(tree, ""), start_again=True))
    assert line.startswith("this is a new run on 41 training and 40 test images, listing ")
    assert f"{first.run_dir} began on 40 training and 40 test images" in line
    assert run_job(second, lambda: True) is None
    assert planned(job(tree, "")) == (replace(second, start_again=False), [])  # the same command, without the choice
    os.unlink(tree / "train" / "cat" / "99.jpg")
    assert planned(job(tree, ""))[0] == first  # and the first one again, once its images are back


def test_a_run_folder_that_is_named_is_not_shared_with_other_images(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=20)
    named = compose_job([*SMALL, "data=imagefolder", f"data.root={tree}", f"run_dir={tmp_path / 'mine'}"])
    assert run_job(planned(named)[0]) is not None
    shutil.rmtree(tree / "train" / "dog")
    shutil.rmtree(tree / "val" / "dog")
    shutil.copytree(tree / "train" / "cat", tree / "train" / "cow")
    shutil.copytree(tree / "val" / "cat", tree / "val" / "cow")
    for asked in (named, replace(named, start_again=True)):
        with pytest.raises(
            ValueError, match=r"data\.root must hold the images that .*mine began with, 40 training and .*give another run_dir"
        ):
            planned(asked)


def test_a_run_that_is_compared_in_another_way_is_told_so(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=20)
    looks = iter([False, True])
    assert run_job(planned(job(tree, ""))[0], lambda: next(looks, True)) is None
    with pytest.raises(
        ValueError, match=r"listing .*; got .*, content .*: compare them in the same way to resume it from step 2, or begin"
    ):
        planned(job(tree, "verify"))


def test_the_fingerprint_is_not_the_users_to_give(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.fingerprint must be left out, since it is computed from the images; got data\.fingerprint=x"
    ):
        compose_job(["data=imagefolder", "data.fingerprint=x"])


def test_a_resume_on_another_count_of_images_names_both(tmp_path: Path) -> None:
    """Also where no fingerprint tells: the checkpoint holds the count."""
    keys = [*SMALL, "data=digits", "data.train_limit=40", f"run_dir={tmp_path / 'run'}"]
    looks = iter([False, True])
    assert run_job(compose_job(keys), lambda: next(looks, True)) is None
    fewer = compose_job([*keys, "data.train_limit=32"])
    (tmp_path / "run" / "config.yaml").unlink()
    result = run_job(fewer)
    assert result is not None
    assert "ImagesChangedError: a run must keep its 40 training images; got 32 now that it resumes at step 2" in result.cause
