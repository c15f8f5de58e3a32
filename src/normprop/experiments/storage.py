"""The database of a study: Optuna's tables behind any SQLAlchemy URL, safe for several workers on SQLite too."""

import time
import warnings
from collections.abc import Callable
from typing import Any

from normprop.errors import ConfigError, requires

with requires("experiments"):
    import optuna
    import sqlalchemy

_BUSY_SECONDS = 60
_ATTEMPTS = 5
_RACES = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.IntegrityError)  # a table or its first row made twice


def connect(url: str, lease: int, retry: Callable[[optuna.Study, optuna.trial.FrozenTrial], None]) -> Any:
    """Open the database and create its tables if they are missing.

    Args:
        url: SQLAlchemy URL, such as "sqlite:///runs/digits/study.db".
        lease: seconds without a sign of life after which a worker's trial is taken from it.
        retry: called by Optuna with the study and each trial taken from a dead worker.

    Returns:
        Optuna's storage, with finished trials cached.

    Raises:
        ConfigError: if the URL is not one or the database cannot be reached.

    Example:
        >>> connect("sqlite:///:memory:", 30, lambda study, trial: None).get_all_studies()
        []
    """
    sqlite = url.startswith("sqlite")
    engine = {"connect_args": {"timeout": _BUSY_SECONDS}} if sqlite else {"pool_pre_ping": True}
    for attempt in range(_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=engine,
                    heartbeat_interval=max(1, lease // 3),
                    grace_period=lease,
                    heartbeat_stale_trial_callback=retry,
                )
            break
        except (*_RACES, optuna.exceptions.StorageInternalError) as error:
            # Two workers that open a new file at the same moment both try to create the tables: one has to look again.
            if attempt == _ATTEMPTS - 1:
                raise _unreachable(url, error) from error
            time.sleep(0.2 * (attempt + 1))
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
            raise _unreachable(url, error) from error
    if sqlite and storage.engine.url.database not in (None, "", ":memory:"):
        _take_write_lock_first(storage.engine)
    return optuna.storages.get_storage(storage)


def hide_password(url: str) -> str:
    """Return the URL with its password replaced by stars.

    Args:
        url: SQLAlchemy URL.

    Returns:
        The URL to show to others.

    Example:
        >>> hide_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url


def _take_write_lock_first(engine: Any) -> None:
    """Begin every SQLite transaction with the write lock.

    Optuna reads a trial's state and then writes it. SQLite's driver begins the transaction only at the write, so two
    processes can both find the trial waiting and both take it; with the lock first, the second one waits and sees it
    taken.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()


def _unreachable(url: str, error: Exception) -> ConfigError:
    """The one line for a database that does not open."""
    cause = str(getattr(error, "orig", None) or error.__cause__ or error).strip().split("\n")[0]
    return ConfigError(f"storage {hide_password(url)!r} does not open ({cause}): expected an SQLAlchemy URL")


def silence() -> None:
    """Keep Optuna from printing a line for every study that it opens; for programs, not for libraries."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
