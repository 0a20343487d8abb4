"""What the scripts share: plain messages, and errors as one line."""

import logging
import sys
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from jaxfusion.errors import InputError


def set_up_logging() -> None:
    """This project's messages as plain lines on stderr; libraries speak from warnings on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jaxfusion")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def run_main(run: Callable[[], None]) -> None:
    """Runs a script; what the user gave wrong ends it with one line and exit status 1."""
    try:
        run()
    except (InputError, flags.Error) as error:
        sys.exit(f"error: {error}")
