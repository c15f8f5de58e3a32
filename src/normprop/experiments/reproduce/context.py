"""How a reproduction runs: its scale, its data, and the storage that keeps what was trained and measured."""

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from normprop.experiments import machine
from normprop.experiments.compare import Progress, train
from normprop.experiments.grid import Combination
from normprop.experiments.settings import Settings
from normprop.experiments.study import Study
from normprop.experiments.trial import COMPLETE, DIVERGED, TrialRecord

Scale = Literal["small", "paper"]


@dataclass(frozen=True)
class Context:
    """What all reproductions are given.

    Args:
        scale: "small" for a reduction that finishes within minutes on two cores, "paper" for the printed protocol.
        storage: SQLAlchemy URL of the database that keeps trials; what it has is not run again.
        data_dir: directory of the published files.
        accelerator: "auto", "cpu", "gpu", ...
        workers: training processes; by default one per core, or one on a GPU.
        seeds: how many seeds; by default the reproduction's own number.
        progress: called with a line on how far it is.
        watch: called with the state of a comparison about once a second.
    """

    scale: Scale
    storage: str
    data_dir: Path | None = None
    accelerator: str = "auto"
    workers: int | None = None
    seeds: int | None = None
    progress: Callable[[str], None] = field(default=lambda line: None)
    watch: Callable[[Progress], None] | None = None

    def seed_list(self, default: int) -> list[int]:
        """Seeds from 0 on, as many as were asked for or else as given here.

        Example:
            >>> Context("small", "sqlite://").seed_list(3)
            [0, 1, 2]
        """
        return list(range(self.seeds or default))

    def train(
        self, study: str, settings: Settings, combinations: Sequence[Combination]
    ) -> dict[Combination, TrialRecord]:
        """Train every combination that the study does not have, in worker processes.

        Args:
            study: its name in the storage.
            settings: what the trials share.
            combinations: methods, batch sizes, rates and seeds.

        Returns:
            The trials of these combinations, with their curves.
        """
        self.progress(f"{study}: training")
        finished = train(
            settings, combinations, storage=self.storage, name=study, workers=self.workers, progress=self.watch
        )
        found = {record.combination: record for record in finished.trials()}
        return {combination: found[combination] for combination in combinations}

    def tuned(
        self,
        study: str,
        settings: Settings,
        cells: Sequence[tuple[str, int]],
        rates: Mapping[int, Sequence[float]],
        seeds: Sequence[int],
    ) -> dict[tuple[str, int], list[TrialRecord]]:
        """Train each method and batch size with every rate and one seed, then with all seeds at its best rate.

        Args:
            study: its name in the storage.
            settings: what the trials share.
            cells: methods and batch sizes.
            rates: for each batch size those to choose from, by the validation error of the first seed.
            seeds: of the runs.

        Returns:
            For every cell its trials at the chosen rate; none where every rate diverged.
        """
        first = seeds[0]
        trials = [Combination(*cell, rate, first) for cell in cells for rate in rates[cell[1]]]
        tried = self.train(study, settings, trials)
        best: dict[tuple[str, int], float] = {}
        for cell in cells:
            errors = {
                rate: record.validation_error
                for rate in rates[cell[1]]
                if (record := tried[Combination(*cell, rate, first)]).status == COMPLETE
                and record.validation_error is not None
            }
            if errors:
                best[cell] = min(errors, key=lambda rate: errors[rate])
        more = [Combination(*cell, rate, seed) for seed in seeds for cell, rate in best.items()]
        trained = self.train(study, settings, more)
        return {cell: [trained[c] for c in more if (c.method, c.batch_size) == cell] for cell in cells}

    def measure(
        self,
        study: str,
        settings: Mapping[str, Any],
        combinations: Sequence[Combination],
        run: Callable[[Combination], Mapping[str, Any] | None],
    ) -> dict[Combination, dict[str, Any] | None]:
        """Run a function for every combination that the study does not have, one after the other in this process.

        Args:
            study: its name in the storage.
            settings: what the trials share, flat; a study made with other settings is refused.
            combinations: what to run.
            run: returns what it measured, as JSON has it, or ``None`` if the run diverged.

        Returns:
            For every combination what was measured, ``None`` where it diverged.
        """
        own = Study.create(self.storage, study, dict(settings))
        own.enrol(combinations)
        own.annotate(versions=machine.versions(), machine=machine.describe(self.accelerator))
        worker = f"{socket.gethostname()}-{uuid.uuid4().hex}"
        while (turn := own.claim(worker)) is not None:
            with turn:
                self.progress(f"{study}: {_named(turn.combination)}, {own.unfinished()} to go")
                measured = run(turn.combination)
                if measured is None:
                    turn.finish(DIVERGED)
                else:
                    turn.finish(COMPLETE, measured=measured)
        found = {record.combination: record for record in own.trials()}
        return {
            combination: found[combination].measured if found[combination].status == COMPLETE else None
            for combination in combinations
        }


def _named(combination: Combination) -> str:
    return f"{combination.method}, batch {combination.batch_size}, rate {combination.lr:g}, seed {combination.seed}"
