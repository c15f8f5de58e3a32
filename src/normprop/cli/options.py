"""The options that say what is trained, shared by the commands that train."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from normprop.errors import ConfigError, requires

with requires("cli"):
    import typer

if TYPE_CHECKING:
    from normprop.experiments.settings import Settings

T = TypeVar("T")

Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result alone.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option("--json", help="Print the result alone, as JSON.", rich_help_panel="Output")]


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


_data = functools.partial(_option, "Data")
_network = functools.partial(_option, "Network")
_training = functools.partial(_option, "Training")


def _settings(
    data: Annotated[
        str, _data("digits, mnist, fashion-mnist, cifar10, cifar100, svhn, an .npz file or a folder of images.")
    ] = "digits",
    data_dir: Annotated[Path | None, _data("Directory of the published files.")] = None,
    image_size: Annotated[int | None, _data("Resize a folder's images to this height and width.")] = None,
    train: Annotated[int | None, _data("Training images; all if not given.", "--train")] = None,
    validation: Annotated[int | None, _data("Validation images; a tenth if not given.", "--validation")] = None,
    test: Annotated[int | None, _data("Test images; all if not given.", "--test")] = None,
    augment: Annotated[str, _data("Comma list of flip and crop.")] = "",
    data_norm: Annotated[str, _data("Normalisation of the input: global, batch or none.")] = "global",
    model: Annotated[
        str,
        _network(
            "nin, mlp, resnet8, resnet14, ..., vit, lstm, two-view, or package.module:factory, called with norm=."
        ),
    ] = "nin",
    width: Annotated[float, _network("Factor on the reference network's channels.")] = 1.0,
    epochs: Annotated[int, _training("Passes over the training images.")] = 6,
    momentum: Annotated[
        float | None, _training("Momentum; 0.9 if not given, with muon 1 - batch size / 80 below batch size 8.")
    ] = None,
    optimizer: Annotated[str, _training("sgd or muon.")] = "sgd",
    weight_decay: Annotated[float, _training("Weight decay.")] = 5e-4,
    schedule: Annotated[str, _training("Course of the lr: constant, halving, linear or cosine.")] = "linear",
    warmup: Annotated[float, _training("Share of the steps that warm up, for linear and cosine.")] = 0.1,
    halve_every: Annotated[int, _training("Epochs between halvings.")] = 10,
    label_smoothing: Annotated[float, _training("Share of each target spread over all classes.")] = 0.0,
    clip_grad: Annotated[float | None, _training("Largest norm of the gradient.")] = None,
    clip_unit: Annotated[
        float | None, _training("Largest norm of a filter's gradient, relative to the filter.")
    ] = None,
    unit_norm: Annotated[bool, _training("Keep the filters of NormProp layers at unit norm.")] = True,
    gain_rate: Annotated[float, _training("Rate of NormProp gains and biases, in rates of their filters.")] = 1.0,
    decouple: Annotated[
        bool, _training("Keep mean and scale of pre-activations out of the gradients of NormProp filters.")
    ] = False,
    precision: Annotated[str, _training("32-true, bf16-mixed, 16-mixed, ...")] = "32-true",
    accelerator: Annotated[str, _training("auto, cpu, gpu, cuda or mps.")] = "auto",
    devices: Annotated[int, _training("Processes that share each batch.")] = 1,
    channels_last: Annotated[
        bool, _training("Lay images out channels last: faster convolutions on most machines.")
    ] = False,
) -> "Settings":
    """Build the settings from the options."""
    from normprop.experiments.settings import Settings
    from normprop.training.config import TrainConfig

    return Settings(
        data=data,
        data_dir=data_dir,
        image_size=image_size,
        model=model,
        width=width,
        train=train,
        validation=validation,
        test=test,
        training=TrainConfig(
            epochs=epochs,
            momentum=momentum,
            optimizer=optimizer,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup=warmup,
            halve_every=halve_every,
            label_smoothing=label_smoothing,
            clip_grad=clip_grad,
            clip_unit=clip_unit,
            augment=tuple(comma_list("--augment", augment, str, "names")),
            data_norm=data_norm,
            precision=precision,
            accelerator=accelerator,
            devices=devices,
            unit_norm=unit_norm,
            gain_rate=gain_rate,
            decouple=decouple,
            channels_last=channels_last,
        ),
    )


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared options in place of its first parameter, the settings.

    Args:
        command: a function of the settings and of its own options.

    Returns:
        A function of its own options and the shared ones, as typer reads them.
    """
    shared = inspect.signature(_settings).parameters
    own = dict(list(inspect.signature(command).parameters.items())[1:])

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        settings = _settings(**{name: values[name] for name in shared})
        command(settings, **{name: values[name] for name in own})

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own.values(), *shared.values())
    ]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def comma_list(option: str, text: str, convert: Callable[[str], T], expected: str) -> list[T]:
    """Read a comma list.

    Args:
        option: the option's name, for the error.
        text: what was given.
        convert: makes a value of one item, raising ValueError if it cannot.
        expected: what the items should be, for the error.

    Returns:
        The values.

    Raises:
        ConfigError: if an item cannot be converted.

    Example:
        >>> comma_list("--seeds", "0, 1", int, "whole numbers")
        [0, 1]
    """
    values = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        try:
            values.append(convert(item))
        except ValueError:
            raise ConfigError(f"{option} must be a comma list of {expected}, got {item!r}") from None
    return values
