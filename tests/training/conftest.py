import pytest
import torch

from normprop.data import Dataset, Split


@pytest.fixture(autouse=True, scope="package")
def _single_thread():
    """Networks this small are slower with more threads, and sums in a fixed order can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def blobs() -> Dataset:
    """Three classes of noisy 1x4x4 images, easy to learn, in [0, 1] as data sets are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 1, 4, 4, generator=generator)

    def part(count: int) -> Split:
        labels = torch.arange(count) % 3
        noise = 0.1 * torch.randn(count, 1, 4, 4, generator=generator)
        return Split((centres[labels] + noise).clamp(0, 1), labels)

    return Dataset("blobs", ("a", "b", "c"), train=part(60), validation=part(30), test=part(30))
