"""Serves a trained bridge, and its LLM alone: a page, and an API for OpenAI's clients.

    serve.py --workdir DIR [--host 127.0.0.1] [--port 8000] [--token TOKEN]

The page is at http://127.0.0.1:8000, the API at http://127.0.0.1:8000/v1. Needs the extra `serve`.
"""

import os

from absl import flags

from jaxfusion.cli import local_path, refuse_words, run_main, set_up_jax, set_up_logging
from jaxfusion.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a bridge", required=True)
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to serve on; one of others wants --token")
PORT = flags.DEFINE_integer("port", 8000, "0: any free one", lower_bound=0, upper_bound=65535)
TOKEN = flags.DEFINE_string("token", None, "that requests have to bear; or in JAXFUSION_TOKEN")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    set_up_logging()
    set_up_jax()
    try:
        from jaxfusion.serving.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jaxfusion"):
            raise
        raise InputError(f"{error.name} is not installed: pip install -e '.[serve]'") from None
    serve(local_path(WORKDIR.value), HOST.value, PORT.value,
          TOKEN.value or os.environ.get("JAXFUSION_TOKEN") or None)


if __name__ == "__main__":
    run_main(main)
