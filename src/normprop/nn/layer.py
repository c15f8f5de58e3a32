"""What all NormProp layers share.

Every layer computes, for output unit i with weight row (filter) W_i,

    o_i = (f(gain_i * (W_i x) / ||W_i|| + bias_i) - c2) / c1,

with c2 and c1 the mean and standard deviation of f(Z). If the input has mean 0 and variance 1, so has the output: no
batch statistics, train() equals eval(), and a sample's output never depends on the other samples.
"""

import inspect
import math
from collections.abc import Container
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop import moments as M
from normprop import operator
from normprop.decoupled import InputMoments
from normprop.errors import ConfigError
from normprop.functional import (
    MomentKind,
    Normalization,
    activate,
    normalization,
    normalize_weight,
    per_channel,
)
from normprop.fused import at_least_float32, filter_statistics, filters, rescale
from normprop.fused_layer import available, layer
from normprop.moments import Activation, Moments
from normprop.moments.quadrature import UNKNOWN
from normprop.nn.known import Known, know
from normprop.nn.known_moments import KnownMoments, Noted
from normprop.orthogonal import orthogonalize_
from normprop.prepared import (
    Constants,
    Convolution,
    Filters,
    Prepared,
    filters_of,
    fixed_constants,
    live_constants,
    prepare,
)

Gain = float | Literal["jacobian"]


def standard_moments(activation: Activation) -> Moments | None:
    """Return the checked moments at N(0, 1); ``None`` if the activation has parameters that hold no values yet."""
    if isinstance(activation, nn.Module) and any(parameter.is_meta for parameter in activation.parameters()):
        return None
    with torch.no_grad(), torch.device("cpu"):  # whatever the default device, e.g. meta
        return M.of(activation)


class NormPropLayer(nn.Module):
    """What all NormProp layers share: the gain, the activation and the normalised weight.

    Mixed into torch's own layer classes, which bring ``weight``, ``bias`` and the linear map.
    """

    weight: Any
    bias: Any
    gain: nn.Parameter
    groups: Any = 1
    _transposed: bool = False
    _spatial_dims: int = 0
    _known: Known | None = None
    _inputs: InputMoments | None = None  # with them the weight's gradients are decoupled
    _ndims: Container[int] = ()  # of inputs for which the layer may run as one function

    def __init__(
        self,
        *args: Any,
        activation: Activation = None,
        center: bool = True,
        moments: MomentKind = "live",
        gain: Gain = 1.0,
        orthogonal: bool = True,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if moments not in ("fixed", "live"):
            raise ConfigError(f"{name}: moments must be 'fixed' or 'live', got {moments!r}")
        if isinstance(gain, str) and gain != "jacobian":
            raise ConfigError(f"{name}: gain must be a number or 'jacobian', got {gain!r}")
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.center = center
        self.orthogonal = orthogonal
        self.moments: MomentKind = moments
        rows = filters(self.weight, self.groups, self._transposed)
        if center and rows.shape[1] * rows.shape[3] == 1:
            raise ConfigError(
                f"{name}: center=True subtracts each filter's mean, which leaves nothing of a filter with a "
                f"single weight (fan-in 1); use center=False here"
            )
        standard = standard_moments(activation)
        if standard is None and gain == "jacobian":
            raise ConfigError(
                f"{name}: gain='jacobian' needs the activation's parameters, but they are on the meta device"
            )
        if gain == "jacobian" and standard is not None:
            # One number for the layer, also where a learnable activation has one slope per channel.
            ratio = torch.as_tensor(standard.var / standard.squared_derivative, dtype=torch.float64, device="cpu")
            gain = ratio.sqrt().mean().item()
        self.initial_gain = float(gain)
        # The constants of N(0, 1), unless the activation has parameters of its own: then they belong in the graph.
        self._standard = None if M.resolve(activation).learnable else standard
        units = rows.shape[0] * rows.shape[2]
        self.gain = nn.Parameter(torch.empty(units, device=self.weight.device, dtype=self.weight.dtype))
        self.reset_parameters()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show torch's own arguments, then ours, in the signature that help() and editors print."""
        super().__init_subclass__(**kwargs)
        ours = [p for p in inspect.signature(NormPropLayer.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for base in cls.__mro__:
            if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module:
                theirs = list(inspect.signature(base).parameters.values())
                cls.__signature__ = inspect.Signature(theirs + ours)  # type: ignore[attr-defined]
                return

    def reset_parameters(self) -> None:
        """Glorot's normalised initialisation for the weight, 0 for the bias, the initial gain for the gain."""
        if "gain" not in self._parameters:  # called by torch's constructor, before there is a gain
            return
        nn.init.xavier_uniform_(self.weight)
        nn.init.constant_(self.gain, self.initial_gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def _phases(self) -> int:
        """Output phases of a transposed convolution: each sees its share of a filter's taps, 1 / phases on average."""
        stride: Any = self.stride if self._transposed else ()
        return math.prod(stride)

    def _constants(self, rule: M.Rule) -> Normalization:
        """Work out what surrounds the linear map."""
        standard = self._standard if self.moments == "fixed" else None
        return normalization(rule, self.gain, self.bias, standard or self.moments)

    def _effective(self, constants: Normalization) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain linear map, in the type of the weight."""
        scale = constants.scale * math.sqrt(self._phases) if self._phases > 1 else constants.scale
        weight = normalize_weight(
            self.weight, scale, center=self.center, groups=self.groups, transposed=self._transposed
        )
        return weight.to(self.weight.dtype), constants.shift.to(self.weight.dtype)

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Apply the layer; the arguments are those of torch's own class."""
        if not args and not torch.compiler.is_compiling() and self._takes(input):
            known = self._still_known()
            if known is not None:
                return self._as_known(input, known)
            if self.fusable:
                return self._fused(input)
        if self._inputs is not None and self.training and torch.is_grad_enabled():
            raise ConfigError(
                f"{type(self).__name__}: decoupled gradients are for eager training in single or double precision, "
                "without transforms such as vmap and without a compiler; remove them here"
            )
        rule = M.resolve(self.activation)
        if not self._transposed and operator.available(self.weight, self.gain, self.bias):
            return self._compiled(input, rule, *args)
        constants = self._constants(rule)
        output = self._linear(input, *self._effective(constants), *args)
        return activate(output, rule, constants, self._spatial_dims)

    def _compiled(self, input: Tensor, rule: M.Rule, *args: Any) -> Tensor:
        """Apply the layer with operators of ours for what the compiler does badly."""
        constants = self._constants(rule)
        mean, shift = constants.mean, constants.shift
        weight = operator.normalize_filters(self.weight, constants.scale, self.center)
        if rule.name != "relu":
            return activate(self._linear(input, weight, shift, *args), rule, constants, self._spatial_dims)
        if isinstance(mean, Tensor):
            mean = operator.computed(mean)
            output = self._linear(input, weight, shift - mean.detach(), *args)
        else:
            output = self._linear(input, weight, shift, *args)
        thresholded: Tensor = operator.Threshold.apply(output, per_channel(mean, output, self._spatial_dims))
        return thresholded

    def _still_known(self) -> Known | None:
        """What the constraint noted in training, if the parameters are as they were; an average of them is not."""
        known = self._known
        if known is None or not self.training or not known.holds(self.weight, self.gain, self.bias):
            return None
        factor = known.prepared.factor  # moving a module to another device or type raises no version
        return known if (factor.device, factor.dtype) == (self.weight.device, self.weight.dtype) else None

    def _as_known(self, input: Tensor, known: Known) -> Tensor:
        """Apply the layer with what is known of its parameters."""
        output = layer(self._batched(input), self.weight, self.gain, self.bias, self._decoupled(known.prepared))
        output = self._shaped(output, input)
        if known.moments is None:
            return output
        mean, reciprocal = Noted.apply(self.gain, self.bias, known.moments)
        normal = Normalization(self.gain, self.gain, mean, reciprocal)  # scale and shift are applied already
        return activate(output, known.moments.rule, normal, self._spatial_dims)

    def _takes(self, input: Tensor) -> bool:
        """Whether the layer may run as one function on an input."""
        return available(input) and input.ndim in self._ndims

    @property
    def fusable(self) -> bool:
        """Whether the layer may run as one function: it is not transposed, its parameters are plain tensors."""
        return not self._transposed and available(self.weight, self.gain, self.bias)

    def _fused(self, input: Tensor) -> Tensor:
        """Apply the layer, but for an activation other than ReLU, as one function."""
        rule = M.resolve(self.activation)
        rows = self._batched(input)
        filters = filters_of(self.weight, self.center)
        if rule.name in ("relu", "identity"):
            prepared = prepare(filters, self.own_constants(self.gain, self.bias), self.center, self._convolution)
            return self._shaped(layer(rows, self.weight, self.gain, self.bias, self._decoupled(prepared)), input)
        normal = self._constants(rule)
        prepared = prepare(filters, Constants(normal.scale, normal.shift, None, 1.0), self.center, self._convolution)
        output = layer(rows, self.weight, normal.scale, normal.shift, self._decoupled(prepared))
        output = self._shaped(output, input)
        return activate(output, rule, normal, self._spatial_dims)

    def _decoupled(self, prepared: Prepared) -> Prepared:
        if self._inputs is None or not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return prepared
        return prepared._replace(inputs=self._inputs)

    @property
    def knowable(self) -> bool:
        """Whether what is known of the parameters serves forward passes.

        It does for activations with a law of their own, but not for people's functions, whose state may change.
        """
        rule = M.resolve(self.activation)
        if rule.name in ("relu", "identity"):
            return True
        own = rule.homogeneous or isinstance(rule.function, nn.Module) or rule.law == UNKNOWN
        return self.moments == "live" and not own

    def know(self, filters: Filters, constants: Constants, moments: KnownMoments | None) -> None:
        """Note what is known of the parameters as they are now, for the forward passes before they change.

        Args:
            filters: what is known of the weight.
            constants: those of the gain and the bias.
            moments: those of an activation other than ReLU.
        """
        prepared = prepare(filters, constants, self.center, self._convolution)
        self.__dict__["_known"] = know(self.weight, self.gain, self.bias, prepared, moments)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is known: a copy finds it out anew."""
        return {**self.__dict__, "_known": None}

    def own_constants(self, gain: Tensor, bias: Tensor | None) -> Constants:
        """Work out the constants of a layer with this one's settings; those of its linear map, but for ReLU.

        Args:
            gain: gamma, (out,).
            bias: beta, (out,), or ``None``.

        Returns:
            What :func:`normprop.prepared.prepare` takes.
        """
        if M.resolve(self.activation).name != "relu":
            return Constants(gain.detach(), torch.zeros_like(gain) if bias is None else bias.detach(), None, 1.0)
        if self.moments == "live":
            return live_constants(gain, bias)
        assert self._standard is not None
        return fixed_constants(gain, bias, float(self._standard.mean), float(self._standard.var) ** 0.5)

    def _shaped(self, output: Tensor, input: Tensor) -> Tensor:
        """Give an output of :meth:`_batched` the leading axes of the input."""
        if input.ndim == self._spatial_dims + 2:
            return output
        return output.reshape(*input.shape[: input.ndim - 1 - self._spatial_dims], *output.shape[1:])

    @property
    def _convolution(self) -> Convolution | None:
        """The numbers of a convolution of what :meth:`_batched` returns."""
        return None

    def _batched(self, input: Tensor) -> Tensor:
        """Input with one batch axis, padded where the convolution does not pad by itself."""
        raise NotImplementedError

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor, *args: Any) -> Tensor:
        raise NotImplementedError

    def output_moments(self) -> Moments:
        """Predicted moments of the layer's output when its input has mean 0 and variance 1.

        Returns:
            Mean 0 and variance 1 after an activation. Without one N(bias, gain^2): per unit and in the graph with
            live moments, at the initial values with fixed ones.
        """
        if M.resolve(self.activation).name != "identity":
            return Moments(0.0, 1.0)
        if self.moments == "fixed":
            return Moments(0.0, self.initial_gain**2)
        bias = torch.zeros_like(self.gain) if self.bias is None else self.bias
        return Moments(bias, self.gain.square())

    @torch.no_grad()
    def normalize_weight_(self) -> None:
        """Rescale every filter to unit length in place (after centring it with ``center``); zero filters stay zero.

        The layer's function is unchanged.

        Source:
            Arpit et al. 2016, section 3.3 (constraint after every update).
        """
        rows = filters(at_least_float32(self.weight), self.groups, self._transposed)
        mean, inverse = filter_statistics(rows, self.center)
        self.weight.copy_(rescale(rows, mean, inverse, self.center).reshape(self.weight.shape))

    def orthogonalize_weight_(self) -> None:
        """Take one step towards filters at right angles: see :func:`normprop.orthogonal.orthogonalize_`."""
        orthogonalize_(self.weight, center=self.center, groups=self.groups, transposed=self._transposed)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Fill the gain from a plain layer's weight, so that the linear map stays what it was."""
        weight = state_dict.get(prefix + "weight")
        if prefix + "gain" not in state_dict and weight is not None and weight.shape == self.weight.shape:
            rows = filters(weight.detach(), self.groups, self._transposed).double()
            norm = torch.linalg.vector_norm(rows, dim=(1, 3))
            if self.center and bool(
                (rows.mean((1, 3)).abs() * (rows.shape[1] * rows.shape[3]) ** 0.5 > 1e-4 * norm).any()
            ):
                errors: list[str] = args[-1] if args else kwargs["error_msgs"]
                errors.append(
                    f"{prefix}weight: a plain layer's filters are not centred, so a layer with center=True cannot keep "
                    f"their function; build {prefix.rstrip('.') or type(self).__name__} with center=False"
                )
            state_dict[prefix + "gain"] = (norm.flatten() / math.sqrt(self._phases)).to(weight.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Torch's own description, then the normalisation settings."""
        parts = [super().extra_repr()]
        if self.activation is not None and not isinstance(self.activation, nn.Module):
            parts.append(f"activation={getattr(self.activation, '__name__', self.activation)!s}")
        parts.append(f"center={self.center}, moments={self.moments}, gain={self.initial_gain:.4g}")
        return ", ".join(parts)
