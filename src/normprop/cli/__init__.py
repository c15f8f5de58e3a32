"""The command line: `normprop train`, `compare`, `report`, `methods`, `inspect`, `convert` and `fold`."""

import signal
import sys

from normprop.errors import MissingExtraError


def main() -> None:
    """Run the command line and exit with its code: 0, 2 for an error named in one line, 130 after Ctrl-C."""
    try:
        # Imported here, so that a missing extra is a line and not a traceback.
        from normprop.cli.app import run
    except MissingExtraError as error:
        print(f"normprop: {error}", file=sys.stderr)
        sys.exit(2)
    # A plain `kill` ends a command as Ctrl-C does: workers stopped, trials put back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also where SIGINT is ignored, in a script's background
    sys.exit(run())
