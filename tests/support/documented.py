"""Read README.md and the pages under docs/: commands, messages, examples, links and names that tests compare with the code."""

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A command with one of these at its end is not run by the tests, and holds one of its words.
MARKS = {
    "needs a cluster": (
        *("--cluster komondor", "--cluster mine", "cluster=komondor", "--clear gpu07", "srun ", "python3.11 -m venv"),
        *(".venv/bin/pip install --editable", "torchrun --nproc-per-node=4 "),
    ),
    "needs the network": (".venv/bin/pip ", "pip install '.[", "git clone "),
}
# What a line of a code block begins with where it is something to type, and not a listing or the output of something.
_PROGRAMS = (
    *("python", "python3", "python3.11", ".venv/bin/python", ".venv/bin/pip", "pip", "make", "torchrun", "tensorboard", "optuna-dashboard"),
    *("apt-get", "export", "git", ".", "source", "cd", "pytest", "srun", "sbatch", "scancel", "scontrol", "squeue", "sinfo", "ray", "bash"),
)
_COMMAND = re.compile(rf"(?:\$ )?((?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, _PROGRAMS))}) .*)")


# Words that 0.1 used in a sense of its own; text for users has the glossary's word instead.
PRIVATE = (
    r"separabl|struck|strikes?\b|in peace|\bbur(?:y|ies|ied)\b|the door|\btold_|the house|\bmend|yardstick|\banew\b|held against|"
    r"\bquotes?\b|\bslots?\b|\bsettings?\b|\bsignatures?\b|to come\b|\binsist|\bdearest\b|\ba hand\b|\bhands\b"
)


@dataclass(frozen=True)
class Command:
    """One line to type."""

    page: str
    text: str  # without its comment, blanks joined
    comment: str

    @property
    def mark(self) -> str:
        """The mark that it carries, or ""."""
        return next((mark for mark in MARKS if self.comment.endswith(mark)), "")


@dataclass(frozen=True)
class Block:
    """One block of code; `language` is "" for an indented one, or a fence without a name."""

    language: str
    lines: tuple[str, ...]


def blocks(path: Path) -> list[Block]:
    """The code blocks of a page, fenced or indented by four blanks."""
    found: list[Block] = []
    lines = path.read_text().splitlines()
    i = 0
    while i < len(lines):
        fence = re.match(r"\s*```(\w*)", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
            found.append(Block(fence[1], tuple(lines[i + 1 : end])))
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block("", tuple(line[4:] for line in lines[i:end] if line.strip())))
            i = end
        else:
            i += 1
    return found


def page(name: str) -> Path:
    """Return the page of that file name, in whichever group of docs/ it is; raise ValueError unless there is exactly one."""
    [found] = [p for p in PAGES if p.name == name]
    return found


def commands() -> list[Command]:
    """Every command of every page."""
    found = []
    for path in PAGES:
        for block in blocks(path):
            lines = re.sub(r"\\\n\s*", "", "\n".join(block.lines)).splitlines()  # a backslash continues a line
            for line in lines if block.language in ("", "bash", "sh", "shell", "console") else ():
                text, _, comment = line.partition("#")
                if match := _COMMAND.fullmatch(" ".join(text.split())):
                    found.append(Command(path.name, match[1], comment.strip()))
    return found


def example(name: str, language: str, number: int = 0) -> str:
    """The n-th fenced block of that language, as a file."""
    made = [b for b in blocks(page(name)) if b.language == language]
    return "\n".join(made[number].lines) + "\n"


def messages(name: str) -> list[str]:
    """The one-line blocks of a page: messages, as they are printed."""
    return [b.lines[0] for b in blocks(page(name)) if len(b.lines) == 1]


def matches(message: str, text: str) -> bool:
    """Whether a line of `text` is `message`, whose … stand for anything."""
    pattern = ".+".join(map(re.escape, message.split("…")))
    return any(re.fullmatch(pattern, line.strip()) for line in text.splitlines())


def prose(path: Path) -> str:
    """The page without its fenced and indented code, and without what a reader does not see."""
    kept, fenced = [], False
    for line in re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.S).splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            kept.append(line)
    return "\n".join(kept)


def code_spans(path: Path) -> list[str]:
    """What stands in code style within the text."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def typed(text: str, instead: Mapping[str, str]) -> list[str]:
    """The words of a documented command, some of them replaced and none left out; raises ValueError at one that it does not have."""
    words = shlex.split(text)
    if unknown := sorted(instead.keys() - set(words)):
        raise ValueError(f"{text!r} has no {' '.join(unknown)}")
    return [instead.get(word, word) for word in words]


def typed_by(source: str, test: str) -> list[str]:
    """The documented commands that the function `test` of a test file makes its words of, by `typed`; none where there is no such test."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == test]
    dropped = {id(node.value) for function in functions for node in ast.walk(function) if isinstance(node, ast.Expr)}
    calls = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Call) and id(node) not in dropped]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "typed" and call.args]
    return [str(call.args[0].value) for call in named if isinstance(call.args[0], ast.Constant)]
