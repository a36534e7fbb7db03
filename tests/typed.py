"""Types the commands of the pages in a copy of the checkout, which they may write into, and which holds the pages' example files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cnnjepa.data.imagenet import imagenet100_classes
from tests.cnnjepa.test_data import image_tree
from tests.documented import ROOT, example

# The files that the pages have a reader write.
EXAMPLES = {
    "sweeps/predictor_depth.py": ("writing-a-sweep.md", "python", 0),
    "sweeps/rate_and_depth.py": ("writing-a-sweep.md", "python", 1),
    "cnnjepa/methods/simsiam.py": ("adding-a-method.md", "python", 0),
    "slurm/cluster/mine.yaml": ("cluster.md", "yaml", 0),
}
_PARTS = ("cnnjepa", "jobs", "sweeps", "slurm", "tests", "Makefile", "pyproject.toml")
# Imports once what every command imports, and forks for each: the imports take longer than most commands.
_PARENT = """
import json, os, runpy, sys
import jobs.pretrain, sweeps.command, sweeps.results
for line in sys.stdin:
    words, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 1
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                sys.path.insert(0, os.path.dirname(words[0]))
                runpy.run_path(words[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Run:
    """How a documented command is made small, and what it must print."""

    said: str
    options: str = ""  # before the first key=value
    overrides: str = ""  # at the end
    starts_others: bool = False  # needs a process of its own: it starts Ray, ranks or pytest

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
        self.places["/tmp/ms"] = Path(f"/tmp/cnnjepa-docs-{os.getpid()}")
        self.environment = {**os.environ, "PYTHONPATH": str(self.home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
        self._parent: subprocess.Popen[str] | None = None

    def place(self, text: str) -> str:
        """`text` with this session's places."""
        for name, path in self.places.items():
            text = text.replace(name, str(path))
        if "<signature>" in text:
            text = text.replace("<signature>", sorted(os.listdir(self.home / "runs" / "single"))[0])
        return text

    def type(self, command: str, run: Run) -> tuple[int, str]:
        """Exit status and output of a command."""
        if "/data/imagenet" in command and not self.places["/data/imagenet"].exists():
            image_tree(self.places["/data/imagenet"], imagenet100_classes(), images=1)
        words = [self.place(word) for word in run.words(command)]
        if words[0] == "python" and not run.starts_others:
            return self._fork(words[1:])
        line = words if words[0] != "." else ["bash", "-c", f"{shlex.join(words)} && command -v python"]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(line, cwd=self.home, env=self.environment, text=True, timeout=300, check=False, **pipes)  # type: ignore[call-overload]
        return done.returncode, done.stdout

    def _fork(self, words: list[str]) -> tuple[int, str]:
        if self._parent is None:
            line, pipe = [sys.executable, "-c", _PARENT], subprocess.PIPE
            self._parent = subprocess.Popen(line, cwd=self.home, env=self.environment, text=True, stdin=pipe, stdout=pipe)
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        output = self.home.parent / "output"
        self._parent.stdin.write(json.dumps([words, str(output)]) + "\n")
        self._parent.stdin.flush()
        status = self._parent.stdout.readline()
        assert status, "the process that commands are forked from has ended"
        return int(status), output.read_text()

    def close(self) -> None:
        """Leave no process and no file."""
        if self._parent is not None:
            assert self._parent.stdin is not None
            assert self._parent.stdout is not None
            self._parent.stdin.close()
            self._parent.wait(timeout=60)
            self._parent.stdout.close()
        if self.places["/tmp/ms"].exists():
            line = [sys.executable, "tests/slurm_cluster.py", "stop", str(self.places["/tmp/ms"])]
            subprocess.run(line, cwd=self.home, env=self.environment, capture_output=True, timeout=120, check=False)
            shutil.rmtree(self.places["/tmp/ms"], ignore_errors=True)
        shutil.rmtree(self.home.parent, ignore_errors=True)
