"""Types the commands of the pages in a copy of the checkout, which they may write into, and which holds the pages' example files."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from cnnjepa.data.imagenet import classes_of
from tests.support.documented import ROOT, example
from tests.support.forked import ForkServer
from tests.support.images import image_tree

# The files that the pages have a reader write.
EXAMPLES = {
    "sweeps/predictor_depth.py": ("writing-a-sweep.md", "python", 0),
    "sweeps/rate_and_depth.py": ("writing-a-sweep.md", "python", 1),
    "cnnjepa/methods/simsiam.py": ("adding-a-method.md", "python", 0),
    "slurm/cluster/mine.yaml": ("cluster-profile.md", "yaml", 0),
}
_PARTS = ("cnnjepa", "jobs", "sweeps", "slurm", "tests", "Makefile", "pyproject.toml")


@dataclass(frozen=True)
class Run:
    """How a documented command is made small, and what it must print."""

    said: str
    options: str = ""  # before the first key=value
    overrides: str = ""  # at the end
    starts_others: bool = False  # needs a process of its own: it starts Ray, ranks or pytest
    after: tuple[str, ...] = ()  # the commands whose work it looks at

    def words(self, command: str) -> list[str]:
        """The words of the command, made small."""
        words = shlex.split(command)
        first = next((i for i, word in enumerate(words) if re.match(r"[a-z][\w.]*=", word)), len(words))
        return [*words[:first], *self.options.split(), *words[first:], *self.overrides.split()]


class Session:
    """A terminal in a copy of the checkout."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "checkout"
        for part in map(ROOT.joinpath, _PARTS):
            if part.is_dir():
                shutil.copytree(part, self.home / part.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
            else:
                shutil.copy(part, self.home / part.name)
        for path, (page, language, number) in EXAMPLES.items():
            (self.home / path).write_text(example(page, language, number))
        (self.home / ".venv").symlink_to(sys.prefix)
        # Places that the pages name, and what stands for them here. munged wants a place that others may look into.
        self.places = {"/data/imagenet": folder / "imagenet", "/scratch/in100": folder / "in100"}
        self.places["runs/joint_search-smoke"] = self.home / "runs" / "rate_and_depth-smoke"  # a search as well, and smaller
        self.places["runs/predictor_ablation-smoke-epochs20"] = self.home / "runs" / "predictor_depth-smoke"  # another one that was run
        self._public = Path(tempfile.mkdtemp(prefix="typed-"))
        self._public.chmod(0o755)
        self.places["/tmp/ms"] = self._public / "ms"
        self.environment = {**os.environ, "PYTHONPATH": str(self.home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        self._parent: ForkServer | None = None
        self.typed: dict[str, tuple[int, str]] = {}

    def place(self, text: str) -> str:
        """`text` with this session's places."""
        for name, path in self.places.items():
            text = text.replace(name, str(path))
        if "<run-id>" in text:
            text = text.replace("<run-id>", next(path.name for path in self.runs_of("cnn_jepa")))
        return text

    def runs_of(self, method: str) -> list[Path]:
        """Return the folders of the single runs of that method that have ended."""
        folders = sorted(path.parent for path in (self.home / "runs" / "single").glob("*/result.json"))
        # Read as text: a method that the pages have a reader write is known in the copy of the checkout alone.
        return [path for path in folders if yaml.safe_load((path / "config.yaml").read_text())["method"]["name"] == method]

    def type(self, command: str, runs: Mapping[str, Run]) -> tuple[int, str]:
        """Return exit status and output of a command, which is typed once, after those whose work it looks at."""
        if command not in self.typed:
            for earlier in runs[command].after:
                status, output = self.type(earlier, runs)
                assert status == 0, f"{earlier}\n{output}"
            self.typed[command] = self._type(command, runs[command])
        return self.typed[command]

    def _type(self, command: str, run: Run) -> tuple[int, str]:
        if "/data/imagenet" in command and not self.places["/data/imagenet"].exists():
            image_tree(self.places["/data/imagenet"], classes_of("imagenet100"), images=2)
        words = [self.place(word) for word in run.words(command)]
        if words[0] == "python" and not run.starts_others:
            if self._parent is None:
                self._parent = ForkServer(self.home, self.environment)
            output = self.home.parent / "output"
            with output.open("w") as file:
                child = self._parent.start(words[1:], env=self.environment, stdout=file, stderr=subprocess.STDOUT)
                return child.wait(timeout=300), output.read_text()
        line = words if words[0] != "." else ["bash", "-c", f"{shlex.join(words)} && command -v python"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(line, cwd=self.home, env=self.environment, text=True, timeout=300, check=False, **pipes)  # type: ignore[call-overload]
        return done.returncode, done.stdout

    def close(self) -> None:
        """Leave no process and no file."""
        if self._parent is not None:
            self._parent.close()
        if self.places["/tmp/ms"].exists():
            line = [sys.executable, "tests/support/slurm_cluster.py", "stop", str(self.places["/tmp/ms"])]
            subprocess.run(line, cwd=self.home, env=self.environment, capture_output=True, timeout=120, check=False)
        shutil.rmtree(self._public, ignore_errors=True)
        shutil.rmtree(self.home.parent, ignore_errors=True)
