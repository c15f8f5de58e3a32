"""The questions that can be asked of any network, by name."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.errors import ConfigError

DEFAULT = (
    "depth-moments",
    "gaussianity",
    "canonical-error",
    "mean-field",
    "gradient-growth",
    "jacobian",
    "power",
    "gradient-histogram",
    "line-profile",
    "output-gradients",
    "sign-coherence",
    "gradient-noise",
    "fisher",
)
"""Asked of a network as it is."""

TRAINING = ("covariate-shift", "divergence-movie", "decay-equivalence")
"""Train copies of the network, for some tens of steps."""

NAMES = DEFAULT + TRAINING


@dataclass(frozen=True)
class Findings:
    """What came of some questions.

    Args:
        diagnoses: answers, in the order of the questions.
        left_out: a line for each network that a question could not be asked of, with the reason.
    """

    diagnoses: Sequence[Diagnosis]
    left_out: Sequence[str]


def ask(name: str, subjects: Sequence[Subject]) -> Findings:
    """Ask one question of some networks.

    Args:
        name: one of ``NAMES``.
        subjects: the networks, each with a name of its own.

    Returns:
        One diagnosis of all networks that it could be asked of, or none.

    Raises:
        ConfigError: for a name that does not exist.
    """
    if name not in NAMES:
        raise ConfigError(f"no diagnosis {name!r}; there are {', '.join(NAMES)}")
    module = importlib.import_module(f"normprop.diagnostics.{name.replace('-', '_')}")
    results, left_out = {}, []
    for subject in subjects:
        try:
            results[subject.name] = module.measure(subject)
        except ConfigError as error:
            left_out.append(f"{name}, {subject.name}: {'; '.join(str(error).splitlines())}")
    return Findings([module.describe(results)] if results else [], left_out)
