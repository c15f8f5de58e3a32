import multiprocessing
import operator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from normprop.data import Dataset
from normprop.errors import ConfigError
from normprop.models import mlp
from normprop.training import TrainConfig, launch
from normprop.training.loop import fit
from normprop.training.run import assemble

NETWORK = partial(mlp, (1, 4, 4), 3, depth=2, hidden_features=16)
CONFIG = TrainConfig(epochs=2, batch_size=8, lr=0.05, augment=("flip", "crop"), accelerator="cpu")


def with_devices(devices: int, config: TrainConfig = CONFIG, **settings) -> TrainConfig:
    return TrainConfig(**{**vars(config), **settings, "devices": devices})


@pytest.fixture(autouse=True)
def _no_process_stays():
    yield
    assert multiprocessing.active_children() == []


def gradients(data: Dataset, config: TrainConfig) -> list[torch.Tensor]:
    """Gradients of one batch: with rate 1 and nothing else, an update moves every parameter by minus its gradient."""
    before = assemble(NETWORK, data, config).double()
    after = fit(NETWORK, data, config).model.double()
    return [old.detach() - new.detach() for old, new in zip(before.parameters(), after.parameters(), strict=True)]


@pytest.mark.parametrize("samples", [59, 1])
def test_processes_over_gloo_give_the_gradients_of_the_whole_batch(blobs, samples):
    """Also for uneven shares, and for a process without any: two processes share one sample."""
    data = Dataset("blobs", blobs.classes, blobs.train[:samples], blobs.test, blobs.validation)
    step = TrainConfig(
        epochs=1,
        batch_size=60,
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        unit_norm=False,
        data_norm="none",
        precision="64-true",
        accelerator="cpu",
    )
    one, several = gradients(data, step), gradients(data, with_devices(2, step))
    # Gains have no gradient here: with bias 0 and live moments a ReLU layer does not depend on them.
    assert all(gradient.abs().max() > 1e-4 for gradient in one if gradient.ndim == 2)
    for ours, theirs in zip(several, one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_interrupted_and_resumed_in_two_processes_equals_one_process(blobs, tmp_path: Path):
    one = fit(NETWORK, blobs, CONFIG)
    path = tmp_path / "last.pt"

    def stop(record):
        if record.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(NETWORK, blobs, with_devices(2), callback=stop, checkpoint=path)
    assert multiprocessing.active_children() == []

    records = []
    two = fit(NETWORK, blobs, with_devices(2), callback=records.append, checkpoint=path, resume=True)
    assert (two.status, two.steps) == ("complete", one.steps)
    # The processes may have finished another epoch before they were stopped.
    assert len(two.curve) == 3
    assert two.curve[-len(records) :] == records or records == []
    for ours, theirs in zip(two.model.state_dict().values(), one.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(two.curve[1:], one.curve[1:], strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert (ours.validation_error, ours.test_error) == (theirs.validation_error, theirs.test_error)


def test_what_is_raised_in_a_process_arrives_here(blobs):
    """A share of one sample is too small for batch norm: torch's own error, and nothing was trained."""
    records = []
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        fit(partial(NETWORK, norm="batch"), blobs, with_devices(2, batch_size=2), callback=records.append)
    assert type(caught.value) is ValueError
    assert records == []


def test_an_unforeseen_error_in_a_process_arrives_with_its_traceback():
    with pytest.raises(ProcessRaisedException, match="unsupported operand"):
        launch.run(operator.add, (1,), 2, print)


def test_a_network_that_cannot_be_sent_is_refused_at_once(blobs):
    with pytest.raises(ConfigError, match=r"^training in 2 processes: .*use functions defined at the top of a module"):
        fit(lambda: NETWORK(), blobs, with_devices(2))
