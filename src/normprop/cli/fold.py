"""`normprop fold`: a network of plain layers, for inference."""

import io
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.cli import converted, models
from normprop.cli.weights import packed
from normprop.errors import ConfigError, GraphError, first_line, requires
from normprop.files import write_content
from normprop.graph.capture import Inputs, arguments

with requires("cli"):
    import typer


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Output")


def fold(
    model: models.Name,
    args: models.Args = "",
    input: models.Input = None,
    weights: models.Weights = None,
    converted: converted.Converted = None,
    convert: Annotated[
        str, typer.Option(help="Convert first, with weights fresh, exact or rescale.", rich_help_panel="Model")
    ] = "",
    seed: models.Seed = 0,
    out: Annotated[Path | None, _option("Write the parameters: .safetensors, or .pt for a state dict.")] = None,
    export: Annotated[Path | None, _option("Write the network by torch.export: .pt2.")] = None,
    onnx: Annotated[Path | None, _option("Write the network in ONNX: .onnx.")] = None,
) -> None:
    """Fold a network's normalisation into its convolutions and linear layers, for inference."""
    for option, path, suffixes in (
        ("--out", out, (".safetensors", ".pt")), ("--export", export, (".pt2",)), ("--onnx", onnx, (".onnx",))
    ):  # fmt: skip
        if path is not None and path.suffix not in suffixes:
            raise ConfigError(f"{option} must be a file {' or '.join(suffixes)}, got {path}")
    loaded = _bring(model, args, input, weights, converted, convert, seed)
    plain = _folded(loaded)
    files = {}
    if out is not None:
        files[out] = packed(plain, out.suffix)
    if export is not None or onnx is not None:
        program = _exported(plain, loaded.x)
        if export is not None:
            content = io.BytesIO()
            torch.export.save(program, content)
            files[export] = content.getvalue()
        if onnx is not None:
            files[onnx] = _onnx(program)
    for path, data in files.items():
        write_content(path, data)
    print(_summary(loaded, plain))
    if out is not None:
        code = models.python(loaded, ["net = normprop.fold(model, x)"], out)
        print(f"\nThe folded network in Python:\n\n{code}\n")
    for path in files:
        print(path)


def _bring(
    name: str,
    args: str,
    inputs: list[str] | None,
    weights: Path | None,
    folder: Path | None,
    convert: str,
    seed: int,
) -> models.Loaded:
    """The network to fold, converted if that was asked for."""
    if convert and folder is not None:
        raise ConfigError("give --convert or --converted, not both")
    loaded = converted.bring(name, args, inputs, weights, folder, seed)
    return converted.convert(loaded, {"weights": convert}) if convert else loaded


def _folded(loaded: models.Loaded) -> nn.Module:
    from normprop.graph.fold import fold as make

    return make(loaded.model, loaded.x)


def _summary(loaded: models.Loaded, plain: nn.Module) -> str:
    """How the folded network compares with the one before."""
    before, after = _outputs(loaded.model, loaded.x), _outputs(plain, loaded.x)
    size = max((float(part.abs().max()) for part in before if part.numel()), default=0.0)
    differences = [float((one - other).abs().max()) for one, other in zip(before, after, strict=True) if one.numel()]
    counts = [sum(not [*module.children()] for module in net.modules()) for net in (loaded.model, plain)]
    numbers = [sum(parameter.numel() for parameter in net.parameters()) for net in (loaded.model, plain)]
    return (
        f"{type(loaded.model).__name__}: {counts[0]} layers become {counts[1]}, {numbers[0]:,} parameters become "
        f"{numbers[1]:,}; largest difference {max(differences, default=0.0) / (size or 1.0):.1e} of the output"
    )


def _outputs(net: nn.Module, x: Inputs) -> list[Tensor]:
    args, kwargs = arguments(x)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        leaves = pytree.tree_leaves(net.eval()(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _exported(net: nn.Module, x: Inputs) -> torch.export.ExportedProgram:
    """The network as a program for any batch size, where it allows that."""
    args, kwargs = pytree.tree_map(_repeated, arguments(x))

    def dynamic(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim else None

    shapes = pytree.tree_map(dynamic, kwargs or args)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what export thinks of the user's code
            return torch.export.export(net.eval(), args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # whatever export cannot take
        raise GraphError(f"{type(net).__name__} cannot be exported by torch.export: {first_line(error)}") from error


def _repeated(leaf: Any) -> Any:
    """A batch of one twice: torch.export takes a size of 1 for one that stays."""
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1 else leaf


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    with requires("onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter thinks of itself
        made = torch.onnx.export(program, verbose=False, dynamo=True)
    assert made is not None
    return bytes(made.model_proto.SerializeToString())
