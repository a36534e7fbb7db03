"""Run a network's graph on tiles: each operation by its rule, up to the last feature map."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cnnjepa.models.visible_call import Call, Kind, Map, Pass, Plain, Rule
from cnnjepa.models.visible_layers import FUNCTIONS, LAYERS, METHODS, WHOLE_IMAGE
from cnnjepa.models.visible_tiles import flat_image, rows
from cnnjepa.models.visible_trace import Place, Tracer, defined_in, traced


@dataclass(frozen=True)
class _Step:
    """One operation of the graph, bound to tiles; or why it cannot be."""

    node: fx.Node
    kind: Kind
    run: Callable[..., Any]
    refused: ValueError | None = None


class Plan:
    """What to run on tiles in the place of a network's pass over images."""

    def __init__(self, model: nn.Module) -> None:
        graph, tracer = traced(model)
        self.model = model
        self.steps: dict[fx.Node, _Step] = {}
        for node in graph.nodes:
            if node.op == "output":
                self.features = self._features(node.args[0], tracer)
            else:
                self.steps[node] = self._bound(node, tracer)
        self.stages = {path: node for path, node in tracer.returned.items() if isinstance(self.steps[node].kind, Map)}
        self.cell = self._map(self.features).reduction
        self._orders: dict[tuple[fx.Node, ...], list[tuple[_Step, list[fx.Node]]]] = {}
        self.order((self.features,))

    def _bound(self, node: fx.Node, tracer: Tracer) -> _Step:
        """Ask the rule of an operation; an operation on plain values runs as it is."""
        at = tracer.places[node]
        inputs = [self.steps[n] for n in node.all_input_nodes]
        refused = next((step.refused for step in inputs if step.refused), None)
        if refused:
            return _Step(node, Plain(), lambda p: None, refused)
        if node.op == "placeholder":
            first = not self.steps
            return _Step(node, Map(image=True) if first else Plain(), lambda p, /, *default: default[0] if default else None)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            holder = self.model.get_submodule(owner)
            return _Step(node, Plain(), lambda p, /: getattr(holder, name))
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        do = module if module is not None else _method(str(node.target)) if node.op == "call_method" else node.target
        if all(isinstance(step.kind, Plain) for step in inputs):
            return _Step(node, Plain(), lambda p, /, *args, **kwargs: do(*args, **kwargs))  # type: ignore[operator]
        kinds = _with(node, lambda n: self.steps[n].kind)
        try:
            return self._ruled(node, Call(at, do, *kinds, module))  # type: ignore[arg-type]
        except ValueError as error:
            return _Step(node, Plain(), lambda p: None, error)

    def _ruled(self, node: fx.Node, call: Call) -> _Step:
        if node.op == "call_module":
            rule, name = LAYERS.get(defined_in(call.module)), ""
        else:
            table: dict[Any, Rule] = METHODS if node.op == "call_method" else FUNCTIONS
            rule, name = table.get(node.target), getattr(node.target, "__name__", str(node.target))
        if rule is None:
            call.at.refuse(f"calls {name}, which is not known on a map" if name else "is not known")
        kind, run = rule(call)
        if rule in WHOLE_IMAGE or not any(m.image for m in call.maps()):
            return _Step(node, kind, run)
        images = [n for n in node.all_input_nodes if getattr(self.steps[n].kind, "image", False)]

        def on_pixels(p: Pass, /, *args: Any, **kwargs: Any) -> Any:
            cut = {id(n): flat_image(p.image, p.tiles) for n in images}
            return run(p, *(cut.get(id(n), v) for n, v in zip(node.args, args, strict=True)), **kwargs)

        return _Step(node, kind, on_pixels)

    def _features(self, result: Any, tracer: Tracer) -> fx.Node:
        """Return the map that the output is, or else the one map that it is computed from."""
        at = Place("", tracer.inside[0].kind)
        if not isinstance(result, fx.Node):
            at.refuse("returns something other than one tensor")
        found, left, seen = [], [result], set()
        while left:
            node = left.pop()
            step = self.steps[node]
            if isinstance(step.kind, Map):
                found.append(node)
            elif step.refused and not any(self.steps[n].refused for n in node.all_input_nodes):
                raise step.refused
            else:
                left += [n for n in node.all_input_nodes if n not in seen]
                seen.update(node.all_input_nodes)
        if len(set(found)) != 1:
            at.refuse("computes its output from several feature maps")
        return found[0]

    def _map(self, node: fx.Node) -> Map:
        kind = self.steps[node].kind
        assert isinstance(kind, Map)
        return kind

    def reduction(self, path: str) -> int:
        """Return how much smaller than the image the map of a module is."""
        return self._map(self.stages[path]).reduction

    def order(self, wanted: tuple[fx.Node, ...]) -> list[tuple[_Step, list[fx.Node]]]:
        """Return the steps that lead to some nodes, each with the values that nobody reads after it."""
        if wanted not in self._orders:
            needed, left = set(wanted), list(wanted)
            while left:
                found = [n for n in left.pop().all_input_nodes if n not in needed]
                needed.update(found)
                left += found
            steps = [step for node, step in self.steps.items() if node in needed]
            last: dict[fx.Node, fx.Node] = {}
            for step in steps:
                if step.refused:
                    raise step.refused
                last.update(dict.fromkeys(step.node.all_input_nodes, step.node))
            dead = {step.node: [n for n, end in last.items() if end is step.node and n not in wanted] for step in steps}
            self._orders[wanted] = [(step, dead[step.node]) for step in steps]
        return self._orders[wanted]

    def run(self, p: Pass, wanted: tuple[fx.Node, ...]) -> list[Tensor]:
        """Return the wanted maps, [B, C, H, W], zero where hidden."""
        values: dict[fx.Node, Any] = {}
        for step, dead in self.order(wanted):
            if step.node.op == "placeholder" and isinstance(step.kind, Map):
                values[step.node] = p.image
            else:
                args, kwargs = _with(step.node, values.__getitem__)
                values[step.node] = step.run(p, *args, **kwargs)
            for node in dead:
                del values[node]
        return [self._whole(p, values[node], self._map(node)) for node in wanted]

    @staticmethod
    def _whole(p: Pass, /, value: Tensor, known: Map) -> Tensor:
        value = value if known.channels == 1 else value.permute(0, 3, 1, 2)
        return value if known.image else p.tiles.spread(rows(value), p.side(known))


def _method(name: str) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def _with(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[Any, Any]:
    """Return a node's arguments with a value in the place of each node."""
    return fx.map_arg((node.args, node.kwargs), value)
