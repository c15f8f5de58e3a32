"""The plain form of one module: torch's own modules, affine maps and floors."""

from torch import fx, nn

from normprop.errors import first_line
from normprop.graph.absorb import LINEAR_MAPS
from normprop.graph.fold_lower import lower
from normprop.graph.fold_probe import probe
from normprop.graph.fold_rewrite import rewrite
from normprop.graph.fold_trace import Shape, Tracer


class NoFormError(Exception):
    """A module that has no plain form, with the reason."""


def form(module: nn.Module, shape: Shape | None) -> nn.Module:
    """The plain form of a module that normalises, or that is of normprop's own.

    Args:
        module: in evaluation and float64, on the CPU.
        shape: of an input of it, if one is known.

    Returns:
        A module with the module's own children inside, as far as they are modules of their own.

    Raises:
        NoFormError: if there is none.

    Example:
        >>> form(nn.BatchNorm2d(3).double().eval(), None)
        Affine()
    """
    if not isinstance(module, LINEAR_MAPS) and not [*module.children()]:
        affine = probe(module, shape)
        if affine is not None:
            return affine
    try:
        graph = Tracer(shape).trace(module)
        lowered = lower(module, graph)
    except Exception as failure:  # whatever a forward does that cannot be followed
        raise NoFormError(
            f"it is no elementwise map, and its forward cannot be followed ({first_line(failure)})"
        ) from failure
    for node in lowered.graph.nodes:
        if _looks(node):
            raise NoFormError("it normalises by statistics of its input, in evaluation too")
    return rewrite(lowered)


def _looks(node: fx.Node) -> bool:
    """Whether a call multiplies activations by what was worked out from activations."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    activations = [source for source in node.all_input_nodes if source.op != "get_attr"]
    products = ("mul", "imul", "div", "truediv", "addcmul", "addcdiv")
    return name.endswith("_norm") or (name.strip("_") in products and len(activations) > 1)
