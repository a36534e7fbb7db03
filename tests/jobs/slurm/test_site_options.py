"""What a profile and a command line make of sbatch's options: left out, replaced, as flags, and as they were typed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cluster import Allocation, ClusterProfile, validate_cluster
from jobs.config import CONFIG_DIR, compose_job, qualified, split_multirun
from jobs.slurm import clients
from jobs.slurm.sbatch import Array, launcher_overrides, render, unexported

ARRAY = Array("sweep-1", 3, 2, "sweeps.execution.worker_main", "/runs/1.json", Path("/code"), Path("/runs/log"))
SLURM = compose_job(["cluster=test_cluster"]).cluster
TEMPLATE = CONFIG_DIR / "profile_template.yaml"


def options(cluster: ClusterProfile) -> dict[str, str]:
    """Return the options of a script by name; none occurs twice."""
    lines = [line.removeprefix("#SBATCH --") for line in render(cluster, ARRAY).splitlines() if line.startswith("#SBATCH")]
    found = {name: value for name, _, value in (line.partition("=") for line in lines)}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize(
    ("given", "gone", "added"),
    [
        ({"mem": None}, {"mem"}, {}),
        ({"gres": None, "requeue": None}, {"gres", "requeue"}, {}),
        ({"signal": None, "open-mode": None}, {"signal", "open-mode"}, {}),
        ({"mem-per-cpu": "2G"}, {"mem"}, {"mem-per-cpu": "2G"}),
        ({"mem_per_gpu": "20G"}, {"mem"}, {"mem-per-gpu": "20G"}),
        ({"mem-per-cpu": None}, set(), {}),
        ({"gpus-per-node": "a100:4"}, {"gres"}, {"gpus-per-node": "a100:4"}),
        ({"gpus-per-task": 1, "mem": 0}, {"gres"}, {"gpus-per-task": "1", "mem": "0"}),
        ({"gpus-per-task": 1, "gres": "craynetwork:0"}, set(), {"gpus-per-task": "1", "gres": "craynetwork:0"}),
        ({"exclusive": True, "requeue": False}, {"requeue"}, {"exclusive": ""}),
        ({"exclusive": False, "exclude": "gpu07"}, set(), {"exclude": "gpu07"}),
        ({"no-requeue": True}, {"requeue"}, {"no-requeue": ""}),
        ({"cpus-per-task": 8, "account": "other"}, set(), {"cpus-per-task": "8", "account": "other"}),
    ],
)
def test_an_option_can_be_left_out_replaced_or_a_flag(given: dict[str, object], gone: set[str], added: dict[str, str]) -> None:
    cluster = replace(SLURM, sbatch=given)
    validate_cluster(cluster)
    assert options(cluster) == {**{k: v for k, v in options(SLURM).items() if k not in gone}, **added}
    # The same through hydra-submitit-launcher.
    launched = launcher_overrides(cluster, "submitit_slurm", "x", Path("/runs"))
    prefix = "++hydra.launcher.additional_parameters."
    further = {o.removeprefix(prefix).partition("=")[0].replace("_", "-") for o in launched if o.startswith(prefix)}
    assert further >= set(added)
    assert further.isdisjoint(gone)
    assert not [o for o in launched if o.startswith(("hydra.launcher.mem", "hydra.launcher.gres"))]


@pytest.mark.parametrize(
    "typed",
    [
        "gpu01,gpu02",
        "gpu[01-02]",
        "gpu[01-02,07],cpu1",
        "a100&nvlink",
        "[a100|h100]*2",
        "me@site.org",
        "x=y",
        "1e3",
        "007",
        "a b",
        "it's",
    ],
)
def test_an_option_is_taken_as_it_is_typed(typed: str) -> None:
    option = "mail-user" if "@" in typed else "exclude"
    for prefix in ("", "cluster."):
        override = f"{prefix}sbatch.{option}={typed}"
        assert compose_job(["cluster=test_cluster", override]).cluster.sbatch == {option: typed}
        # A grid of jobs.pretrain, in which a comma outside quotes separates values.
        quoted = f'{prefix}sbatch.{option}="{typed}"' if "," in typed else override
        (job,) = split_multirun(qualified(["cluster=test_cluster", quoted]))
        assert compose_job(job).cluster.sbatch == {option: typed}


@pytest.mark.parametrize(("typed", "value"), [("null", None), ("true", True), ("False", False), ("'a,b'", "a,b"), ('"null"', "null")])
def test_words_with_a_meaning_keep_it_unless_they_are_quoted(typed: str, value: object) -> None:
    assert compose_job(["cluster=test_cluster", f"sbatch.mem={typed}"]).cluster.sbatch == {"mem": value}


@pytest.mark.parametrize("option", ["array", "job-name", "job_name", "output", "dependency", "wait"])
def test_what_the_launcher_needs_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^cluster\.sbatch must leave array, .* to the launcher; got {option.replace('_', '-')}$"):
        compose_job(["cluster=test_cluster", f"sbatch.{option}=x"])


def test_an_empty_option_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cluster\.sbatch\.exclude must be .* or null to leave it out; got ''$"):
        compose_job(["cluster=test_cluster", "sbatch.exclude="])


def test_a_profile_names_further_variables_and_no_more_than_names() -> None:
    named = options(replace(SLURM, export=["APPTAINER_BIND", "PATH"]))["export"].split(",")
    assert named.count("PATH") == named.count("APPTAINER_BIND") == 1
    assert {"HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "https_proxy", "MODULEPATH", "BASH_FUNC_module%%"} <= set(named)
    assert not {n for n in named if n.startswith(("SLURM_", "SBATCH_")) or n in ("ALL", "LC_ALL", "TMPDIR")}
    for wrong in ("A=1", "a b", "", "x,y"):
        with pytest.raises(ValueError, match=r"^cluster\.export must hold names of variables; got "):
            validate_cluster(replace(SLURM, export=[wrong]))


def from_template(folder: Path, *keys: str) -> ClusterProfile:
    """Return the template's profile with the alternatives of these keys."""
    text = TEMPLATE.read_text()
    for key in keys:
        pattern = rf"^#( *{re.escape(key)}:)"
        assert re.search(pattern, text, re.M), key
        text = re.sub(pattern, r"\1", text, flags=re.M)
    (folder / "mine.yaml").write_text(text)
    return compose_job([f"cluster={folder}/mine.yaml"]).cluster


@pytest.mark.parametrize(
    ("keys", "gone", "added"),
    [
        ((), set(), {"gres": "gpu:4", "mem": "128000M", "account": "my_project", "mail-type": "FAIL"}),
        (("gres",), set(), {"gres": "gpu:a100:4"}),
        (("gpus-per-node",), {"gres"}, {"gpus-per-node": "a100:4"}),
        (("gpus-per-task", "mem-per-cpu"), {"gres", "mem"}, {"gpus-per-task": "1", "mem-per-cpu": "4000M"}),
        (("mem", "requeue"), {"mem", "requeue"}, {}),
        (("exclusive", "constraint", "exclude"), set(), {"exclusive": "", "constraint": "'a100&nvlink'", "exclude": "'gpu[01-02],gpu07'"}),
        (("qos", "local_scratch", "export"), set(), {"qos": "normal"}),
    ],
)
def test_each_alternative_of_the_template_renders(keys: tuple[str, ...], gone: set[str], added: dict[str, str], tmp_path: Path) -> None:
    cluster = from_template(tmp_path, *keys)
    found = options(cluster)
    assert found.items() >= added.items()
    assert found.keys().isdisjoint(gone)
    whole = render(Allocation.of(cluster, 2, None).whole(cluster), ARRAY)
    assert "#SBATCH --nodes=2" in whole


def test_in_a_container_the_template_starts_the_ranks_alone(tmp_path: Path) -> None:
    lines = render(from_template(tmp_path, "python"), ARRAY, python="/venv/bin/python").splitlines()
    assert lines[-3].startswith("/venv/bin/python -u -m jobs.slurm.supervisor")
    assert lines[-1].strip().startswith("apptainer exec --nv /scratch/my_project/image.sif python -u -m sweeps.execution.worker_main")


def test_every_alternative_of_the_template_is_rendered_somewhere_here() -> None:
    keys = re.findall(r"^#( *)([a-z_-]+):", TEMPLATE.read_text(), re.M)
    assert {key for _, key in keys} == {
        *("qos", "local_scratch", "gres", "python", "export", "gpus-per-node", "gpus-per-task", "mem-per-cpu", "mem", "requeue"),
        *("exclusive", "constraint", "exclude"),
    }


@pytest.mark.parametrize(
    ("profile", "names"),
    [
        ({}, ["NCCL_DEBUG", "TORCHINDUCTOR_CACHE_DIR", "UCX_TLS"]),
        ({"export": ["NCCL_DEBUG", "UCX_TLS"]}, ["TORCHINDUCTOR_CACHE_DIR"]),
        ({"export": ["NCCL_DEBUG", "UCX_TLS", "TORCHINDUCTOR_CACHE_DIR"]}, []),
        ({"sbatch": {"export": "ALL"}}, []),
        ({"sbatch": {"export": None}}, []),
        ({"sbatch": {"export": "PATH,NCCL_DEBUG=INFO"}}, ["CUDA_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME", "UCX_TLS"]),
    ],
)
def test_the_variables_of_libraries_that_jobs_do_not_get_are_said(
    profile: dict[str, Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = ("NCCL_DEBUG", "UCX_TLS", "TORCHINDUCTOR_CACHE_DIR", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_HOME", "EDITOR")
    monkeypatch.setattr(clients, "_FROM_THE_SHELL", frozenset(shell))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIRS", "set by a library since")
    line = unexported(replace(SLURM, **profile))
    several, own = len(names) > 1, ",".join([*profile.get("export", []), *names])
    what = f"{', '.join(names)} {'are' if several else 'is'} set in this shell and {'do' if several else 'does'} not reach jobs"
    key = "sbatch.export" if "sbatch" in profile else f"export=[{own}] on the command line, or export in the cluster profile"
    remedy = f"to pass {'them' if several else 'it'} on: {key}"
    assert line == (f"{what}; {remedy}" if names else "")
