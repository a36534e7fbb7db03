"""Write down what a network does to an image, as a graph of its layers (torch.fx), and name its layers in refusals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx, nn

# Layers that are taken whole, though torch.fx could look into them: by where they are defined, since neither timm nor
# torchvision is imported here.
WHOLE = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.drop.DropPath",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}
# A pass over images that ends before the classifier, where a network has one: timm's.
FEATURES = "forward_features"


def qualified(kind: type) -> str:
    """Return a class's full name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def defined_in(module: nn.Module) -> str:
    """Return the full name of the class whose forward pass a module has: an inherited one is that of its base."""
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__.removesuffix('.forward')}"


@dataclass(frozen=True)
class Place:
    """A layer of a network, as a refusal names it."""

    path: str
    kind: str

    def refuse(self, why: str) -> NoReturn:
        """Raise ValueError with one line: which layer, and why."""
        raise ValueError(f"visible: {self.path or 'the network itself'} ({self.kind}): {why}")


class Tracer(fx.Tracer):
    """Trace a network down to torch's own layers; keep where each operation stands and what each module returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inside = [Place("", qualified(type(model)))]
        self.places: dict[fx.Node, Place] = {}
        self.returned: dict[str, fx.Node] = {}
        if callable(getattr(model, FEATURES, None)):
            self.traced_func_name = FEATURES

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one operation: its forward pass is one of torch's own layers, or in `WHOLE`."""
        where = defined_in(m)
        return where in WHOLE or (where.startswith("torch.nn.modules.") and not isinstance(m, nn.Sequential))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace one call of a module."""
        path = self.path_of_module(m)
        self.inside.append(Place(path, qualified(type(m))))
        out = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not reached if tracing failed, so that the refusal names the innermost module
        if isinstance(out, fx.Proxy):
            self.returned[path] = out.node
        return out

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node, and keep in which module it is."""
        node = super().create_node(*args, **kwargs)
        self.places[node] = self.inside[-1]
        return node


def traced(model: nn.Module) -> tuple[fx.Graph, Tracer]:
    """Return the graph of a network's pass over images; raise ValueError that names the layer if there is none."""
    tracer = Tracer(model)
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            Place(path, qualified(type(module))).refuse("has forward hooks, which would not run")
    try:
        return tracer.trace(model), tracer
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        tracer.inside[-1].refuse(f"torch.fx cannot trace its forward pass: {why}")
