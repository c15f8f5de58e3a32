"""Comparisons of methods at equal budget: a study in a database, workers that take its trials, and its results."""

from normprop.experiments.compare import compare
from normprop.experiments.grid import Grid
from normprop.experiments.results import document, table
from normprop.experiments.settings import Settings
from normprop.experiments.study import Study

__all__ = ["Grid", "Settings", "Study", "compare", "document", "table"]
