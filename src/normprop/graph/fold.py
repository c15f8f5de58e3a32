"""Folding: a network without normalisation that does what the normalised one does in evaluation."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.errors import ConversionError, GraphError, first_line
from normprop.graph.absorb import LINEAR_MAPS
from normprop.graph.capture import Inputs, arguments, capture, require_shapes
from normprop.graph.fold_check import check_guess, check_module, check_network
from normprop.graph.fold_flow import Flow, GraphFlow, SequenceFlow
from normprop.graph.fold_form import NoFormError, form
from normprop.graph.fold_merge import merge
from normprop.graph.fold_probe import normalises
from normprop.graph.fold_settle import settle
from normprop.graph.fold_trace import Shape, ours
from normprop.graph.node import leaves
from normprop.graph.random_state import preserved
from normprop.norms.kalman import KalmanBlock, KalmanResidual


def fold(net: nn.Module, x: Inputs | None = None) -> nn.Module:
    """Fold all normalisation that is fixed in evaluation into convolutions and linear layers.

    The result is a copy made of torch's own modules and of the network's own classes, whose forward code runs as
    before; of normprop nothing is left, and it loads where normprop is not installed. Layers of normprop become torch's
    layers with the weight that they work out; batch norm and its relatives (whatever has running statistics) go into
    the layer before or behind. What cannot go there exactly, such as a shift in front of zero padding, stays as one
    elementwise operation. A residual block of normprop's becomes a ``torch.fx.GraphModule``.

    Normalisers that look at their input in evaluation have no plain form: torch's own (group norm, layer norm) stay,
    and so does what the network's own forward code normalises by calling functions.

    Hooks of modules that are replaced are not kept.

    Args:
        net: any network; it stays as it is.
        x: example input: a tensor, a tuple of positional arguments or a dict of keyword arguments. Without it a
            normaliser is folded only into its neighbour in an ``nn.Sequential``, and the result is compared module by
            module instead of as a whole; features are then taken to have no axes behind them.

    Returns:
        The folded network in evaluation mode, with the types, the device and ``requires_grad`` of the original.

    Raises:
        ConversionError: if a module of normprop's has no plain form, if one is called from a list of Python's own, or
            if the result, computed in float64, differs from ``net.eval()`` by more than rounding.
        GraphError: if the network has parameters without a shape.

    Source:
        Ours; of batch norm into a convolution: Jacob et al. 2018.

    Example:
        >>> from normprop.nn import Conv2d
        >>> net = nn.Sequential(Conv2d(3, 8, 3, activation="relu"), Conv2d(8, 2, 3))
        >>> fold(net, torch.randn(1, 3, 8, 8))
        Sequential(
          (0): Sequential(
            (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
            (1): ReLU(inplace=True)
          )
          (1): Conv2d(8, 2, kernel_size=(3, 3), stride=(1, 1))
        )
    """
    require_shapes(net)
    work, reference = _copy(net), _copy(net)
    inputs = None if x is None else pytree.tree_map(_widened, arguments(x))
    with torch.no_grad():
        forms = _forms(work, {} if inputs is None else _shapes(work, *inputs))
    plain = _substituted(work, forms)
    flow = SequenceFlow(plain) if inputs is None else _captured(plain, *inputs)
    with torch.no_grad():
        merge(plain, flow)
        plain = settle(plain, flow, {id(module) for module in forms.values()})
        if inputs is None:
            check_guess(reference, plain)
        else:
            check_network(reference, plain, *inputs)
    _require_registered(plain)
    return _restored(plain, net).eval()


def _copy(net: nn.Module) -> nn.Module:
    """A copy in evaluation, in float64 on the CPU."""
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_complex():
            raise ConversionError(f"fold: {name} is complex; only networks of real numbers can be folded")
    try:
        return copy.deepcopy(net).cpu().double().eval()
    except (RuntimeError, TypeError) as failure:
        raise ConversionError(f"fold: {type(net).__name__} cannot be copied ({failure})") from failure


def _widened(leaf: Any) -> Any:
    """A tensor on the CPU, in float64 if it is of a floating-point type."""
    return leaf.detach().cpu().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _foldable(module: nn.Module) -> bool:
    return ours(module) or normalises(module)


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Shape]:
    """The shape of the input of every module that may be folded and takes one tensor."""
    seen: dict[int, Shape] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            seen[id(module)] = tuple(inputs[0].shape)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if _foldable(module)]
    try:
        with preserved(model):
            model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as failure:
        raise ConversionError(
            f"fold: {type(model).__name__} cannot run in float64 on the example input: {first_line(failure)}"
        ) from failure
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _forms(model: nn.Module, shapes: dict[int, Shape]) -> dict[int, nn.Module]:
    """The plain form of every module that has to go, the outer ones first; nothing is replaced yet."""
    forms: dict[int, nn.Module] = {}
    _unlink(model)
    own = {id(module): path for path, module in model.named_modules()}
    waiting = [model]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = [*module.children()][::-1]  # so that the first is the next
        if not _foldable(module):
            waiting += children
            continue
        path, shape = own[id(module)], shapes.get(id(module))
        try:
            plain = form(module, shape)
        except NoFormError as reason:
            if ours(module):
                raise ConversionError(
                    f"fold: {path or 'the network'} ({type(module).__name__}) has no plain form: {reason}"
                ) from reason
            waiting += children
            continue
        check_module(path, module, plain, shape)
        trained = any(parameter.requires_grad for parameter in module.parameters())
        inside = [plain]
        while inside:
            part = inside.pop()
            if id(part) in own:
                waiting.append(part)
                continue
            inside += part.children()
            if type(part) in LINEAR_MAPS:
                part.requires_grad_(trained)
        forms[id(module)] = plain
    return forms


def _unlink(model: nn.Module) -> None:
    """Let the blocks of Kalman normalisation forget each other where no prior is taken from the block before."""
    blocks = [module for module in model.modules() if isinstance(module, (KalmanBlock, KalmanResidual))]
    if not any(block.norm.takes_prior for block in blocks if isinstance(block, KalmanBlock)):
        for block in blocks:
            block.link = None


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """Who feeds whom when the network runs."""
    try:
        return GraphFlow(capture(model, kwargs or args))
    except GraphError as failure:
        raise ConversionError(
            f"fold: {failure}; its forward may ask more of a module that is folded than to be called"
        ) from failure


def _substituted(model: nn.Module, forms: dict[int, nn.Module]) -> nn.Module:
    """The network with the form of every module in each of its places."""

    def last(module: nn.Module) -> nn.Module:
        return last(forms[id(module)]) if id(module) in forms else module

    model = last(model)
    waiting, seen = [model], set()
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = last(child)
            waiting += module.children()
    return model


def _require_registered(plain: nn.Module) -> None:
    """Refuse a network that holds, beside its submodules, modules which folding has not reached."""
    reached = {id(module) for module in plain.modules()}
    for path, module in plain.named_modules():
        for name, value in vars(module).items():
            held = leaves(value) if name != "_modules" else ()
            if any(isinstance(leaf, nn.Module) and id(leaf) not in reached and _foldable(leaf) for leaf in held):
                place = f"{path}.{name}" if path else name
                raise ConversionError(
                    f"fold: {place} holds modules that are no submodules or have been folded elsewhere; use "
                    f"nn.ModuleList or nn.ModuleDict"
                )


def _restored(plain: nn.Module, net: nn.Module) -> nn.Module:
    """The folded network in the types and on the devices of the original."""
    before = dict(_tensors(net))

    def like(name: str) -> Tensor | None:
        """The tensor of the same name, or the first one of the module around it."""
        if name in before:
            return before[name]
        around = name.rpartition(".")[0]
        prefix = f"{around}." if around else ""
        inside = (value for key, value in before.items() if key.startswith(prefix) and value.is_floating_point())
        return next(inside, like(around) if around else None)

    cast: dict[int, Tensor] = {}
    for name, tensor in _tensors(plain):
        model = like(name)
        if model is None:
            continue
        dtype = model.dtype if tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(model.device, dtype)
        else:
            path, _, last = name.rpartition(".")
            buffer = cast.setdefault(id(tensor), tensor.to(model.device, dtype))
            plain.get_submodule(path)._buffers[last] = buffer
    return plain


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
