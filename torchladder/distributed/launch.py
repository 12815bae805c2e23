"""``python -m torchladder.distributed.launch``: torchrun, which ends with one line if the ranks refuse to start.

Takes torchrun's arguments. torchrun shows a traceback for every exit code but 0; for invalid settings and for a
rendezvous that fails, a line and exit code 2 say it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

from torchladder.distributed.ranks import LAUNCHED

INVALID_SETTINGS = 2
"""Exit code of ranks that refuse their settings; each has recorded its message for torchrun."""


def main() -> int:
    """Runs torchrun; returns its exit code."""
    os.environ[LAUNCHED] = "1"
    for module in ("api", "errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}").addFilter(_is_news)
    try:
        run.main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        recorded: Any = failure.message  # a table, if the rank has recorded an exception
        if failure.exitcode != INVALID_SETTINGS or not isinstance(recorded, dict):
            raise
        kind_and_message = recorded["message"]
        print(f"torchladder: {kind_and_message.partition(': ')[2]}", file=sys.stderr)
        return INVALID_SETTINGS
    except (RendezvousConnectionError, RendezvousTimeoutError) as error:
        endpoint = os.environ.get("RDZV_ENDPOINT", "the endpoint")
        print(
            f"torchladder: the nodes did not meet at RDZV_ENDPOINT={endpoint} ({error}). It must name one of the "
            "nodes, be the same on all of them, and its port must be free and open.",
            file=sys.stderr,
        )
        return INVALID_SETTINGS
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record says more than that a rank has refused its settings and the others are ended."""
    message = record.getMessage()
    known = f"(exitcode: {INVALID_SETTINGS})", "closing signal", "no error file defined for parent"
    return not any(text in message for text in known)


if __name__ == "__main__":
    sys.exit(main())
