"""What the pages name is there: links, files, keys of the configuration, options, and every field of a profile."""

import dataclasses
import re
from pathlib import Path

import pytest

from cnnjepa.config import TrainConfig, method_module, method_names, optimizer_presets
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.task import RENAMED
from jobs.cluster import ClusterProfile
from jobs.config import cluster_names
from tests.support.documented import PAGES, PRIVATE, ROOT, Block, blocks, code_spans, messages, page, prose
from tests.support.typed import EXAMPLES

LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Options of other programs that the pages speak of.
_FOREIGN_OPTIONS = {"--help", "--nv", "--gpus-per-node", "--test-only", "--overlap", "--signal", "--inspect", "--logdir", "--constraint"}
_FOREIGN_OPTIONS |= {"--exclude", "--exclusive", "--export", "--gres", "--mem", "--mem-per-cpu", "--requeue"}  # of sbatch


def anchors(path: Path) -> set[str]:
    """What GitHub lets a link name of a page: its headings, in small letters, without marks, blanks as hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", target):
            continue
        to, _, anchor = target.partition("#")
        file = (path.parent / to).resolve() if to else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"(?<![\w/.<>-])((?:cnnjepa|jobs|sweeps|slurm|tests|docs)/[\w./-]*\w)(?![\w<*{-])", prose(path))
    assert [n for n in dict.fromkeys(named) if not (ROOT / n).exists() and n not in EXAMPLES] == []


def keys() -> set[str]:
    """Every key that may be overridden, and every part of a path to one."""
    found = {"run_dir", "retry_failed", "start_again", "cluster", "hydra", "task"}

    def walk(config: object, path: str) -> None:
        for f in dataclasses.fields(config):  # type: ignore[arg-type]
            key = path + f.name
            found.add(key)
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                walk(value, key + ".")

    for name in method_names():
        walk(TrainConfig(method=method_module(name).Config()), "")
    for f in dataclasses.fields(ClusterProfile):
        found |= {f.name, f"cluster.{f.name}"}
    return found


_GROUPS = {"data", "encoder", "method", "optimizer", "probes", "checkpoint", "log", "cluster"}
# Written with = and no keys of the configuration.
_NO_KEYS = {
    "paper",
    "objective",
    "headline",
    "costs",
    "best_of_many",
    "named_by",
    "prune_on",
    "yes",
    "name",
    "token",
    "api_key",
    "password",
    "state",
    "pickled",
    "log",
    "key",
    "user",
    "when",
}


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_keys_that_are_named_exist(path: Path) -> None:
    known = keys() | set(RENAMED if path.name == "CHANGELOG.md" else ())
    unknown = []
    for span in code_spans(path):
        for word in span.split():
            key, sign, _ = word.partition("=")
            dotted = "." in key and key.split(".")[0] in _GROUPS and not key.endswith((".py", ".json", ".md", ".md)", ".csv", ".yaml"))
            if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*", key) or not (dotted or (sign and key not in _NO_KEYS)):
                continue
            if key not in known and not key.startswith(("sbatch.", "cluster.sbatch.", "hydra")):
                unknown.append(word)
    assert unknown == []


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_presets_that_are_named_exist(path: Path) -> None:
    presets = {"data": set(DATA_PRESETS), "method": {*method_names(), "simsiam"}, "optimizer": set(optimizer_presets())}
    presets["cluster"] = {*cluster_names(), "mine", "NAME"}
    text = path.read_text()
    for key, value in re.findall(r"(?<![\w.-])(data|method|optimizer|cluster)=([\w]+)", text):
        assert value in presets[key], f"{key}={value}"
    for value in re.findall(r"--cluster (\w+)", text):
        assert value in presets["cluster"], f"--cluster {value}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_options_that_are_named_exist(path: Path) -> None:
    code = "\n".join(p.read_text() for part in ("cnnjepa", "jobs", "sweeps", "tests") for p in (ROOT / part).rglob("*.py"))
    known = set(re.findall(r'"(--[a-z][a-z-]+)"', code)) | {f"--no-{o[2:]}" for o in re.findall(r'"(--[a-z-]+)"', code)}
    named = {o for span in code_spans(path) for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert sorted(named - known - _FOREIGN_OPTIONS) == []


def test_every_field_of_a_profile_is_explained() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", page("cluster-profile.md").read_text().split("| field |")[1].split("| profile |")[0], re.M)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(named) == sorted(f.name for f in dataclasses.fields(ClusterProfile))


def test_every_profile_is_in_the_table_of_profiles() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", page("cluster-profile.md").read_text().split("| profile |")[1], re.M)
    assert sorted(rows) == cluster_names()


def test_readme_holds_one_picture() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(docs/images/(\w+\.png)\)", (ROOT / "README.md").read_text())
    assert pictures == ["report.png"]


def test_pages_have_names_of_their_own_and_stand_in_one_of_four_groups() -> None:
    assert len({p.name for p in PAGES}) == len(PAGES)
    groups = {"get-started", "guides", "reference", "how-it-works"}
    assert {p.parent.name for p in PAGES[1:] if p.name != "index.md"} == groups


def test_the_readme_is_short_and_leads_to_the_index_which_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert "(docs/index.md)" in text
    index = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^\| \[[^\]]+\]\(([^)#\s]+)\) \|", index, re.M)
    assert sorted(listed) == sorted(str(p.relative_to(ROOT / "docs")) for p in PAGES[1:] if p.name != "index.md")
    sections = re.split(r"^## ", index, flags=re.M)[1:]
    assert [len(set(re.findall(r"^\| \[[^\]]+\]\(([\w-]+)/", part, re.M))) for part in sections] == [1, 1, 1, 1]


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_lines_of_prose_are_short(path: Path) -> None:
    """Tables, headings, pictures and code may be longer, and so may a line that is one long link or one piece of code."""
    lines = [line for line in prose(path).splitlines() if not line.startswith(("|", "#", "!["))]
    assert [line for line in lines if len(line) > 100 and re.search(r"\S+ \S+", re.sub(r"`[^`]+`|\]\([^)]+\)", "x", line))] == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_pages_use_the_words_of_the_glossary(path: Path) -> None:
    if path.name == "glossary.md":
        return
    text = " ".join(re.sub(r"`[^`\n]+`|\]\([^)\s]+\)|[\w/.-]+\.(?:py|json|md)\b", "", prose(path)).split())
    assert re.findall(rf".{{0,40}}(?:{PRIVATE}).{{0,20}}", text, re.I) == []


@pytest.mark.parametrize("path", LINKED, ids=lambda p: p.name)
def test_decimals_have_a_leading_zero(path: Path) -> None:
    assert re.findall(r".{0,20}(?<![\w.)\]*])\.\d.{0,10}", re.sub(r"`[^`\n]+`", "", prose(path))) == []


def test_blocks_are_found_however_they_are_written(tmp_path: Path) -> None:
    made = tmp_path / "page.md"
    made.write_text("text\n\n    make a   # why\n    out\n\n- item\n    no code, it goes on\n\n```bash\nmake b\n```\n\nThe `key=1` end.\n")
    assert blocks(made) == [Block("", ("make a   # why", "out")), Block("bash", ("make b",))]
    assert code_spans(made) == ["key=1"]


def test_a_message_of_two_lines_would_escape_the_test_of_messages() -> None:
    assert len(messages("faq.md")) == len(blocks(page("faq.md")))
