"""One bad node: what Python reads there at its start, so that whatever opens a run's records ends."""

_TEXT = """
import importlib.util, os, signal, sys

sys.path.extend({path!r})


def broken(self, *rest):
    {how}


class Breaks:
    # Once the module is imported, and not before: a job imports the copy of the code that was made for it.
    def find_spec(self, name, path=None, target=None):
        if name != "cnnjepa.run.folder":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loads(module):
            load(module)
            module.RunFolder.open_metrics = broken

        spec.loader.exec_module = loads
        return spec


if os.environ.get("SLURMD_NODENAME") == {node!r}:
    sys.meta_path.insert(0, Breaks())
"""
ODD = 'raise RuntimeError(f"the flux of {os.getpid()} is odd")'


def broken_at_start(how: str = ODD, node: str = "gpu01", path: tuple[str, ...] = ()) -> str:
    """Return the text of a sitecustomize.py; `how` is a statement, and `path` is added to sys.path on every node."""
    return _TEXT.format(how=how, node=node, path=list(path))
