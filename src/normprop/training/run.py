"""A network in training: one epoch of updates, its measurement, and its whole state."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.data import Dataset, Split, augment, batches
from normprop.errors import requires
from normprop.nn import DataNorm
from normprop.training import random_state, schedules, statistics
from normprop.training.adaptive_clip import adaptive_gradient_clip_
from normprop.training.config import TrainConfig
from normprop.training.decouple import decouple
from normprop.training.divergence import LossWatch
from normprop.training.groups import parameter_groups
from normprop.training.muon import Muon, momentum_at
from normprop.training.records import EpochRecord
from normprop.training.unit_norm import constrain, recognize

with requires("train"):
    from lightning_fabric import Fabric

_PROBE = 128
_EVALUATION_BATCH = 512
_EVALUATION_BATCH_CPU = 64  # larger maps leave a core's cache: 1.1 in place of 0.7 ms an image


def assemble(build: Callable[[], nn.Module], dataset: Dataset, config: TrainConfig) -> nn.Module:
    """Seed all generators, build the network and put the input normalisation before it.

    Args:
        build: makes the network.
        dataset: gives the statistics of the input.
        config: the settings.

    Returns:
        The network in training mode, on the CPU.
    """
    random_state.seed(config.seed)
    model = build()
    if config.data_norm != "none":
        norm = DataNorm(dataset.shape, mode="batch" if config.data_norm == "batch" else "global")
        model = nn.Sequential(norm.fit(batches(dataset.train, 4096, shuffle=False)), model)
    return model.train()


class Run:
    """Everything that changes while a network trains.

    Args:
        fabric: gives device, precision and processes.
        build: makes the network.
        dataset: training, validation and test images.
        config: the settings.
    """

    def __init__(self, fabric: Fabric, build: Callable[[], nn.Module], dataset: Dataset, config: TrainConfig) -> None:
        self.fabric = fabric
        self.config = config
        # Fabric's own wrapper of modules would round images to 16 bits before DataNorm sees them, and costs 50 us a
        # step. Its strategy does the rest just as well.
        precision = fabric.strategy.precision
        self.model = fabric.to_device(precision.convert_module(assemble(build, dataset, config)))
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = fabric.strategy.setup_module(self.model)
        self.dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        network = self.model[1] if isinstance(self.model, nn.Sequential) and config.data_norm != "none" else self.model
        self.layers = statistics.watched(network)
        self.dataset = dataset.to(fabric.device)
        groups = parameter_groups(
            self.model,
            config.weight_decay,
            unit_norm=config.unit_norm,
            lr=config.lr,
            gain_rate=config.gain_rate,
            matrices=config.optimizer == "muon",
        )
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "muon":
            momentum = momentum_at(config.batch_size) if config.momentum is None else config.momentum
            self.optimizer = Muon(groups, lr=config.lr, momentum=momentum)
        else:
            # One kernel for all parameters. Not under a GradScaler: it forbids clipping, and momentum stays
            # uninitialised memory when the first step is skipped (torch 2.13).
            fused = config.precision != "16-mixed"
            momentum = 0.9 if config.momentum is None else config.momentum
            self.optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=momentum, fused=fused)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters = list(self.model.parameters())
        if config.unit_norm:
            constrain(self.optimizer, self.model)
        self.decoupling = decouple(self.model) if config.decouple else None
        if fabric.global_rank > 0:  # dropout masks of its own for each process
            random_state.seed((config.seed + fabric.global_rank) % 2**32)

        self.sizes = batch_sizes(len(dataset.train), config.batch_size)
        steps = config.epochs * len(self.sizes)
        warmup = min(round(config.warmup * steps), steps - 1)
        self.schedule = schedules.create(config.schedule, steps, warmup, config.halve_every * len(self.sizes))
        self.watch = LossWatch(
            limit=10 * math.log(dataset.num_classes),
            warmup=warmup,
            span=min(50, len(self.sizes)),
            reduce=lambda losses: fabric.strategy.all_reduce(losses, reduce_op="mean"),
        )
        # The order does not depend on what a network draws, so every method sees the same batches.
        self.order = torch.Generator().manual_seed(config.seed)
        self.augmentation = torch.Generator().manual_seed(config.seed + 2**32)
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0

    def rehearse(self) -> None:
        """Try a forward pass in training mode on the smallest batch to come, and leave no trace.

        Raises:
            ValueError: torch's own, from a network that cannot train on so few samples.
        """
        smallest = max(1, min(self.sizes) // self.fabric.world_size)
        images, _ = next(batches(self.dataset.train, smallest, shuffle=False))
        buffers = [
            (part, name, b, b.clone()) for part in self.model.modules() for name, b in part.named_buffers(recurse=False)
        ]
        with random_state.preserved(), torch.no_grad():
            self._logits(self.model, images)
            for part, name, buffer, value in buffers:
                setattr(part, name, buffer.copy_(value))

    def train_epoch(self) -> str | None:
        """Make one pass over the training images; return the reason if the run has diverged."""
        start = time.perf_counter()
        try:
            return self._train_epoch()
        finally:
            self.seconds += time.perf_counter() - start

    def _train_epoch(self) -> str | None:
        fabric, config, optimizer, watch = self.fabric, self.config, self.optimizer, self.watch
        self.network.train()
        watch.start(self.step)
        for images, labels in join_single(
            batches(self.dataset.train, config.batch_size, shuffle=True, generator=self.order)
        ):
            factor = self.schedule(self.step)
            for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * factor
            loss = self._loss(images, labels)
            fabric.backward(loss)
            self._clip()
            fabric.strategy.optimizer_step(optimizer)
            for parameter in self.parameters:  # optimizer.zero_grad(set_to_none=True) without its 15 us of bookkeeping
                parameter.grad = None
            self.step += 1
            if reason := watch.add(loss, len(labels)):
                return reason
        self.epoch += 1
        return watch.read()

    def _clip(self) -> None:
        """Clip the gradients; one that is not finite is the business of the GradScaler and of the divergence test."""
        config, fabric = self.config, self.fabric
        if config.clip_grad is not None:  # takes off the GradScaler's factor, which may be done once only
            fabric.clip_gradients(self.model, self.optimizer, max_norm=config.clip_grad, error_if_nonfinite=False)
        elif config.clip_unit is not None:
            fabric.strategy.precision.unscale_gradients(self.optimizer)
        if config.clip_unit is not None:
            adaptive_gradient_clip_([weight for weight in self.parameters if weight.ndim >= 2], config.clip_unit)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of this process's share of a batch, scaled so that the mean over processes is the batch's."""
        images, labels = self._augment(images, labels)
        weight = 1.0
        if self.fabric.world_size > 1:
            total, processes, rank = len(labels), self.fabric.world_size, self.fabric.global_rank
            share = slice(rank, None, processes)
            weight = len(labels[share]) * processes / total
            # A process without a share takes part with weight 0, because the others wait for its gradients.
            share = share if weight > 0 else slice(0, 1)
            images, labels = images[share], labels[share]
        logits = self._logits(self.network, images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return loss if weight == 1.0 else loss * weight

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        """Outputs of the network in at least single precision."""
        if self.config.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.fabric.autocast():
            logits: Tensor = network(images.to(self.dtype))
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def _augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Flip and crop a whole batch, alike in all processes; labels of pixels move with them."""
        names = self.config.augment
        if not names:
            return images, labels
        masks = labels.ndim > 1
        moved = torch.cat([images, labels.unsqueeze(1).to(images.dtype)], 1) if masks else images
        moved = augment(moved, self.augmentation, flip="flip" in names, pad=4 if "crop" in names else 0)
        return (moved[:, :-1], moved[:, -1].to(labels.dtype)) if masks else (moved, labels)

    def measure(self) -> tuple[EpochRecord, str | None]:
        """Evaluate the network; return the record, and the reason if its outputs show that the run has diverged."""
        with statistics.evaluating(self.model):
            validation, finite = self._error(self.dataset.validation)
            test, also_finite = self._error(self.dataset.test)
            probe, _ = next(batches(self.dataset.validation, _PROBE, shuffle=False))
            with statistics.recording(self.layers) as outputs:
                self._logits(self.model, probe)
        record = EpochRecord(
            epoch=self.epoch,
            step=self.step,
            lr=self.config.lr * self.schedule(max(self.step - 1, 0)),
            train_loss=self.watch.mean if self.step else None,
            validation_error=validation,
            test_error=test,
            seconds=self.seconds,
            layers=statistics.summarize(outputs),
        )
        return record, None if finite and also_finite else f"outputs were not finite after step {self.step}"

    def _error(self, split: Split) -> tuple[float, bool]:
        """Return the fraction of a split's labels that are missed, and whether all outputs are finite."""
        share = split[self.fabric.global_rank :: self.fabric.world_size]
        counts = torch.zeros(2, device=self.fabric.device)
        size = _EVALUATION_BATCH_CPU if self.fabric.device.type == "cpu" else _EVALUATION_BATCH
        for images, labels in batches(share, size, shuffle=False):
            logits = self._logits(self.model, images)
            counts += torch.stack([(logits.argmax(1) != labels).sum(), (~logits.isfinite()).sum()])
        wrong, broken = self.fabric.strategy.all_reduce(counts, reduce_op="sum").tolist()
        return wrong / split.labels.numel(), broken == 0

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, in plain containers; all processes must call this."""
        everyone: list[Any] = [random_state.capture()]
        if self.fabric.world_size > 1:
            own, everyone = everyone[0], [None] * self.fabric.world_size
            torch.distributed.all_gather_object(everyone, own)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "decoupling": {} if self.decoupling is None else self.decoupling.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
            "random": everyone,
            "losses": list(self.watch.recent),
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to a state from :meth:`state`.

        Raises:
            KeyError, RuntimeError, ValueError: torch's own, for the state of another network.
        """
        self.model.load_state_dict(state["model"])
        if self.config.unit_norm:
            recognize(self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.decoupling is not None:
            self.decoupling.load_state_dict(state["decoupling"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.order.set_state(state["order"])
        self.augmentation.set_state(state["augmentation"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.watch.start(self.step, state["losses"])
        random_state.restore(state["random"][self.fabric.global_rank])


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """Return the sizes of an epoch's batches, as :func:`join_single` leaves them.

    Example:
        >>> batch_sizes(10, 4), batch_sizes(9, 4)
        ([4, 4, 2], [4, 5])
    """
    sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
    if len(sizes) > 1 and sizes[-1] == 1 and sizes[-2] > 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def join_single(pairs: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Join a last batch of a single sample to the one before it, because some normalisers cannot train on it.

    Example:
        >>> data = Split(torch.zeros(9, 2), torch.arange(9))
        >>> [len(labels) for _, labels in join_single(batches(data, 4, shuffle=False))]
        [4, 5]
    """
    held = next(pairs)
    for pair in pairs:
        if len(pair[1]) == 1 < len(held[1]):
            held = torch.cat([held[0], pair[0]]), torch.cat([held[1], pair[1]])
        else:
            yield held
            held = pair
    yield held
