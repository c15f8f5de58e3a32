"""Where the files of a published data set are looked for, and what is said when one is missing or damaged."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normprop.errors import DataError


@dataclass(frozen=True)
class Published:
    """A data set that its authors publish as files.

    Args:
        name: its name in `normprop.data.load`.
        folders: the folders below the data directory in which people keep it.
        page: where its authors publish it.

    Example:
        >>> print(Published("toy", ("toy",), "example.org/toy").error(Path("toy/a"), "is empty", "12 bytes"))
        toy: toy/a is empty; expected 12 bytes; published at example.org/toy
    """

    name: str
    folders: tuple[str, ...]
    page: str

    def error(self, where: Path | str, problem: str, expected: str) -> DataError:
        """The line for a missing or damaged file.

        Args:
            where: the file or folder.
            problem: what is wrong with it.
            expected: what should have been there.

        Returns:
            The error, to be raised.

        Example:
            >>> type(Published("toy", (), "example.org").error("a", "is empty", "12 bytes")).__name__
            'DataError'
        """
        return DataError(f"{self.name}: {where} {problem}; expected {expected}; published at {self.page}")

    def directory(self, data_dir: Path, files: Iterable[str]) -> Path:
        """The first of the published folders, then `data_dir` itself, that holds any file of the set.

        Args:
            data_dir: the data directory.
            files: names of files of the set.

        Returns:
            The folder.

        Raises:
            DataError: if no folder holds any of the files.

        Example:
            >>> Published("toy", (), "example.org").directory(Path("/nowhere"), ["a", "b"])
            Traceback (most recent call last):
            normprop.errors.DataError: toy: /nowhere holds none of its files; expected a, b; published at example.org
        """
        names = list(files)
        places = [*(data_dir / folder for folder in self.folders), data_dir]
        for place in places:
            if any((place / name).is_file() for name in names):
                return place
        raise self.error(" or ".join(map(str, places)), "holds none of its files", ", ".join(names))
