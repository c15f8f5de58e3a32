"""Published models as a fixture: a test that names ``real_case`` runs on the smallest model of every architecture.

Which these are takes seconds to find out, in every process that collects. It is kept in the cache of pytest under the
versions of the libraries, so that later runs import a library only where one of its models is tested.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from tests.graph.families import Case


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "real_case" in metafunc.fixturenames:
        metafunc.parametrize("real_case", [_parameter(*entry) for entry in _entries(metafunc.config)], indirect=True)


@pytest.fixture
def real_case(request: pytest.FixtureRequest) -> Case:
    """A published model with fresh weights in training mode and its smallest input; made anew for each test."""
    from tests.graph import real_models

    return real_models.build(*request.param)


def _parameter(library: str, name: str, missing: str):
    marks = [pytest.mark.skip(reason=missing)] if missing else []
    return pytest.param((library, name), id=f"{library}-{name}" if name else library, marks=marks)


def _entries(config: pytest.Config) -> list[list[str]]:
    """Library, model and, in place of a library's models, the reason why they are missing."""
    cache = getattr(config, "cache", None)
    key = f"real_models/{_fingerprint()}"
    entries = cache.get(key, None) if cache else None
    if entries is None:
        from tests.graph import real_models

        left_out = real_models.survey().left_out.items()
        entries = [[model.library, model.name, ""] for model in real_models.smallest_models()]
        entries += [[library, "", reason] for library, reason in left_out if library in real_models.LIBRARIES]
        if cache:
            cache.set(key, entries)
    return entries


def _fingerprint() -> str:
    """Everything that the list of models depends on."""
    parts = [path.read_text() for path in sorted(Path(__file__).parent.glob("real_*.py"))]
    for package in ("torch", "torchvision", "monai", "transformers"):
        try:
            parts.append(version(package))
        except PackageNotFoundError:
            parts.append("none")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
