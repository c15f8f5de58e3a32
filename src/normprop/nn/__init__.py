"""NormProp layers: torch's layers that keep mean 0 and variance 1 without batch statistics."""

from normprop.nn.conv import Conv1d, Conv2d, Conv3d
from normprop.nn.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from normprop.nn.data_norm import DataNorm
from normprop.nn.initial import init_by_depth_
from normprop.nn.layer import NormPropLayer
from normprop.nn.linear import Linear
from normprop.nn.lstm import LSTM
from normprop.nn.predicted import (
    Predicted,
    PredictedConv1d,
    PredictedConv2d,
    PredictedConv3d,
    PredictedConvTranspose1d,
    PredictedConvTranspose2d,
    PredictedConvTranspose3d,
    PredictedLayer,
    PredictedLinear,
    PredictedNorm,
)
from normprop.nn.residual import Residual, output_moments
from normprop.nn.skip import Skip

__all__ = [
    "LSTM",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DataNorm",
    "Linear",
    "NormPropLayer",
    "Predicted",
    "PredictedConv1d",
    "PredictedConv2d",
    "PredictedConv3d",
    "PredictedConvTranspose1d",
    "PredictedConvTranspose2d",
    "PredictedConvTranspose3d",
    "PredictedLayer",
    "PredictedLinear",
    "PredictedNorm",
    "Residual",
    "Skip",
    "init_by_depth_",
    "output_moments",
]
