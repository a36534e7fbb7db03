"""Whatever is asked for is composed and obeys every rule, or is refused in one line with key, rule and value: no third way."""

import dataclasses
import functools
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnjepa.config import TrainConfig, method_module, method_names
from cnnjepa.rules import validate
from cnnjepa.run.identity import DEFAULT_TASK, from_dict, signature, to_dict
from jobs.cluster import ClusterProfile, Scheduler, validate_cluster
from jobs.config import _compose, _leaves, compose_job
from jobs.slurm.sbatch import Array, render
from jobs.task import task_named
from sweeps.cli.plan import parse, plan
from sweeps.joint_search import SWEEP as SEARCH

# What a hand, a script or a template may leave in place of a value.
WORDS = [
    *("", "0", "-1", "1", "3", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "99999999999999999999", "-99999999999999999999", "0x10"),
    *("true", "null", "None", "[]", "[1,2]", "[a", "{}", "{a:1}", "{a:{b:[1]}}", "''", '""', "'", "a b", "a=b", "a:b", "1,2", "???"),
    *(
        "${x}",
        "${seed}",
        "${oc.env:HOME}",
        "${oc.env:NO_SUCH_VARIABLE}",
        "${",
        "$(id)",
        "`id`",
        "a\nb",
        "a\x00b",
        "\u202e",
        "ünïcödé",
        "日本",
    ),
    *("../..", "~", "*", "-x", "--", "!!python/object:x", "range(1,3)", "glob(*)", "choice(1,2)", "[" * 200, "x" * 5000),
]
QUICK = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(error: ValueError) -> None:
    """Of the right form: one line with a rule and a value."""
    said = str(error)
    assert type(error) is ValueError, repr(error)
    assert said.isprintable(), said
    assert " must " in said, said
    assert "; got" in said or ", got" in said, said


@functools.cache
def keys(method: str) -> list[str]:
    return _leaves(_compose([f"method={method}"], task_named(DEFAULT_TASK)))


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    method = draw(st.sampled_from(method_names()))
    made = [f"method={method}", "optimizer.warmup_epochs=0"]
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys(method)))
        key = draw(st.sampled_from([key, key, key, key.rpartition(".")[0] or key, f"{key}.x", f"+{key}", f"~{key}"]))
        made.append(f"{key}={draw(st.sampled_from(WORDS) | st.text(max_size=8))}")
    return made + draw(st.sampled_from([[], [], ["cluster=komondor", "account=a"], ["cluster=test_cluster"]]))


@pytest.mark.slow
@settings(QUICK, max_examples=120)
@given(overrides())
def test_every_override_is_taken_or_refused_in_one_line(given_overrides: list[str]) -> None:
    try:
        job = compose_job(given_overrides)
    except ValueError as error:
        check(error)
        return
    validate(job.train, job.cluster.ranks_per_trial)
    assert signature(from_dict(to_dict(job.train))) == signature(job.train)
    if job.cluster.scheduler is Scheduler.slurm:
        assert script_is_shell_of_ours(job.cluster)


def script_is_shell_of_ours(cluster: ClusterProfile) -> bool:
    """Whether each line before the set-up is an option of sbatch."""
    from pathlib import Path

    head = render(cluster, Array("n", 1, 1, "m", "a", Path("/code"), Path("/log"))).split("# setup")[0].splitlines()
    return all(line.startswith("#") or not line for line in head)


def leaves(config: Any) -> Iterator[tuple[Any, dataclasses.Field[Any]]]:
    """Every (object, field) of a configuration that holds a value."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield config, f


def value_for(owner: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of the type of a field, at its edges and beyond."""
    value = getattr(owner, name)
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, Enum):
        return st.sampled_from(type(value))
    if isinstance(value, int):
        return st.sampled_from([-(10**20), -1, 0, 1, 2, 3, 8, 2**31, 2**32, 2**63, 10**30]) | st.integers()
    if isinstance(value, float):
        return st.floats() | st.sampled_from([0.0, -0.0, 1.0, 1e-320, 1e308])
    if isinstance(value, list):
        (element,) = get_args(get_type_hints(type(owner))[name])
        of_type = {int: st.integers(-3, 3), float: st.floats(), str: st.sampled_from(["linear", "knn", "", "x"])}
        return st.lists(of_type[element], max_size=3)
    return st.text(max_size=5)


@st.composite
def configurations(draw: st.DrawFn) -> tuple[TrainConfig, int]:
    config = TrainConfig(method=method_module(draw(st.sampled_from(method_names()))).Config())
    config.optimizer.warmup_epochs = 0.0
    found = list(leaves(config))
    for _ in range(draw(st.integers(1, 4))):
        owner, f = draw(st.sampled_from(found))
        if f.name != "name" or isinstance(getattr(owner, f.name), Enum):
            setattr(owner, f.name, draw(value_for(owner, f.name)))
    return config, draw(st.sampled_from([1, 1, 1, 2, 4, 7]))


@pytest.mark.slow
@settings(QUICK, max_examples=1500)
@given(configurations())
def test_a_configuration_obeys_the_rules_or_is_refused_in_one_line(made: tuple[TrainConfig, int]) -> None:
    config, ranks = made
    try:
        validate(config, ranks)
    except ValueError as error:
        check(error)
        return
    for owner, f in leaves(config):
        number = getattr(owner, f.name)
        assert not isinstance(number, float) or number == number, f.name
        assert not isinstance(number, int) or abs(number) < 2**32, f.name


@st.composite
def profiles(draw: st.DrawFn) -> ClusterProfile:
    profile = ClusterProfile("fuzzed", scheduler=draw(st.sampled_from(Scheduler)))
    for _ in range(draw(st.integers(1, 4))):
        _, f = draw(st.sampled_from([x for x in leaves(profile) if x[1].name not in ("name", "scheduler", "required")]))
        value = getattr(profile, f.name)
        texts = st.text(max_size=8) | st.sampled_from(WORDS)
        if f.name == "sbatch":
            setattr(profile, f.name, draw(st.dictionaries(texts, texts | st.integers() | st.none() | st.lists(texts), max_size=2)))
        elif f.name == "setup":
            setattr(profile, f.name, draw(st.lists(texts, max_size=2)))
        else:
            setattr(profile, f.name, draw(texts if isinstance(value, str) else value_for(profile, f.name)))
    return profile


@pytest.mark.slow
@settings(QUICK, max_examples=1500)
@given(profiles())
def test_a_profile_can_be_rendered_or_is_refused_in_one_line(profile: ClusterProfile) -> None:
    try:
        validate_cluster(profile)
    except ValueError as error:
        check(error)
        return
    if profile.scheduler is Scheduler.slurm:
        assert script_is_shell_of_ours(profile)


FLAGS = [
    "--seeds",
    "--max-trials",
    "--eta",
    "--budget-gpu-hours",
    "--max-gpu-hours",
    "--early-stopping",
    "--sampler",
    "--scale",
    "--cluster",
]
FLAGS += ["--backend", "--nodes", "--trials-per-node"]
NUMBERS = ["-1", "0", "1", "2", "3", "nan", "inf", "-inf", "1.5", "x", "", "ü", "1e9", "99999999999999999999", "-x", "asha", "none"]
NUMBERS += ["grid", "gp", "allocation", "ray", "komondor"]


@pytest.mark.slow
@settings(QUICK, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.sampled_from(NUMBERS)), min_size=1, max_size=3))
def test_options_of_a_sweep_make_a_plan_or_are_refused(pairs: list[tuple[str, str]]) -> None:
    try:
        sweep, _ = plan(SEARCH, parse(SEARCH, ["--dry-run", *(f"{flag}={value}" for flag, value in pairs)]))
    except ValueError as error:
        check(error)
        return
    assert sweep.trials


def test_the_check_itself_can_fail() -> None:
    for said in ("x must be y; got\nz", "x is wrong; got y", "x must be y"):
        with pytest.raises(AssertionError):
            check(ValueError(said))
