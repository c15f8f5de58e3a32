"""The end of folding: every affine map and floor that no layer has taken up becomes one plain operation."""

import operator
from typing import Any

import torch
from torch import fx, nn

from normprop.errors import ConversionError
from normprop.graph.fold_flow import Flow
from normprop.graph.fold_merge import put
from normprop.graph.fold_parts import Affine, Floor, Part, settled
from normprop.graph.fold_rewrite import called

_SUMS = (operator.add, torch.add)


def settle(model: nn.Module, flow: Flow, made: set[int]) -> nn.Module:
    """Replace what is left of folding by torch's own modules.

    Args:
        model: a network of plain modules, affine maps and floors, changed in place.
        flow: knows the number of axes where the network was captured.
        made: ids of the modules that folding has made, from which those that do nothing are dropped.

    Returns:
        The network.

    Raises:
        ConversionError: if where the channels lie cannot be known without an example input.
    """
    graphs = [part for part in model.named_modules() if isinstance(part[1], fx.GraphModule) and id(part[1]) in made]
    for path, module in graphs:
        _fuse(module, path, flow)
    for path, part in [*model.named_modules()]:
        if isinstance(part, Part):
            plain = settled(part, flow.axes(path))
            if plain is None:
                raise ConversionError(
                    f"fold: {path or 'the network'} normalises channels, and without an example input the number of "
                    f"axes behind them is not known; call fold(net, x)"
                )
            if not path:
                return plain
            put(model, path, plain)
    for _, module in graphs:
        _tidy(module)
    for path, chain in [*model.named_modules()][::-1]:
        if id(chain) in made and type(chain) is nn.Sequential:
            if not path:
                return _pruned(chain)
            put(model, path, _pruned(chain))
    return model


def _fuse(module: Any, path: str, flow: Flow) -> None:
    """Let a sum scale one of its terms in the same pass, and what follows it overwrite it."""
    for node in [*module.graph.nodes]:
        if node.op != "call_function" or node.target not in _SUMS or len(node.args) != 2:
            continue
        for term, other in (node.args, node.args[::-1]):
            part = called(module, term)
            if not isinstance(part, Affine) or len(term.users) > 1 or bool((part.shift != 0).any()):
                continue
            axes = flow.axes(f"{path}.{term.target}" if path else str(term.target))
            if part.dims is None and part.scale.ndim == 1 and axes is None:
                continue
            name = f"{term.target}_scale"
            module.register_buffer(name, part.aligned(part.scale, axes or 2).clone())
            with module.graph.inserting_before(node):
                scale = module.graph.get_attr(name)
                total = module.graph.call_function(torch.addcmul, (other, term.args[0], scale))
            node.replace_all_uses_with(total)
            module.graph.erase_node(node)
            module.graph.erase_node(term)
            break
    for node in module.graph.nodes:
        floor = called(module, node)
        source: Any = node.args[0] if node.args else None
        if isinstance(floor, Floor) and source.op == "call_function" and len(source.users) == 1:
            floor.inplace = floor.inplace or source.target in (*_SUMS, torch.addcmul)  # a new tensor, no one else's
    module.delete_all_unused_submodules()


def _tidy(module: Any) -> None:
    """Drop modules that do nothing from a graph."""
    for node in [*module.graph.nodes]:
        if isinstance(called(module, node), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    module.recompile()


def _pruned(chain: nn.Sequential) -> nn.Module:
    """A sequence without the modules that do nothing, or the one module that is left."""
    steps = [step for step in chain if not isinstance(step, nn.Identity)]
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()
