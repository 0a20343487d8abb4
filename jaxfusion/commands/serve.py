"""Serves a trained bridge and its LLM alone, or an LLM: `serve --workdir DIR [--port 8000]`.

A page is at http://127.0.0.1:8000, an API for OpenAI's clients at http://127.0.0.1:8000/v1. Needs
the extra `serve`.
"""

import os

from absl import flags

from jaxfusion.cli import local_path, refuse_words, run_main, set_up_jax, set_up_logging
from jaxfusion.errors import InputError

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "of a bridge or of Lens, or an export",
                              required=True, flag_values=FLAGS)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to serve on; others need a token too",
                           flag_values=FLAGS)
PORT = flags.DEFINE_integer("port", 8000, "0: any free one", lower_bound=0, upper_bound=65535,
                            flag_values=FLAGS)
TOKEN = flags.DEFINE_string("token", None, "that requests have to bear; or in JAXFUSION_TOKEN",
                            flag_values=FLAGS)
GROUPS = {"The run": (WORKDIR,), "Where it is served": (HOST, PORT, TOKEN)}


def main(argv: list[str]) -> None:
    """Serves the run until SIGTERM."""
    refuse_words(argv)
    set_up_logging()
    set_up_jax()
    try:
        from jaxfusion.serving.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxfusion"):
            raise
        raise InputError(f"{error.name} is not installed: pip install 'jaxfusion[serve]', or "
                         "pip install -e '.[serve]' in the repository") from None
    serve(local_path(WORKDIR.value), HOST.value, PORT.value,
          TOKEN.value or os.environ.get("JAXFUSION_TOKEN") or None)


def run() -> None:
    """The command `serve`."""
    run_main(main, __doc__, FLAGS, GROUPS)
