from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnjepa.models.visible_net import visible as visible


def __getattr__(name: str) -> Any:
    """Import `visible` when it is asked for: what imports other modules of this package does not pay for it."""
    if name == "visible":
        from cnnjepa.models.visible_net import visible

        return visible
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
