"""A task's rows as a bridge's ids, in training and on development rows."""

from collections.abc import Sequence

from jaxfusion.data.batching import Cut, Shapes, TokenRows, find_shapes, tokenize
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.split_text import Continued, tokenize_texts
from jaxfusion.data.tasks.spec import Task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import Config


def tokenized(
    config: Config, task: Task, examples: Sequence[Example], tokenizers: Tokenizers, latents: int
) -> tuple[TokenRows | Continued, Cut | None]:
    """The examples with their targets, and what was cut; unlabelled texts, whose split differs in
    every epoch.

    Args:
      latents: of the bridge.

    Raises:
      InputError: as in `tokenize_texts`.
    """
    c = config.data
    limits = {"max_encoder_tokens": c.max_encoder_tokens,
              "max_decoder_tokens": c.max_decoder_tokens, "latents": latents}
    if task.unlabelled:
        return tokenize_texts(examples, tokenizers, seed=config.train.seed, **limits), None
    return tokenize(examples, tokenizers, text_prompt=c.text_prompt, with_target=True,
                    max_total_tokens=c.max_total_tokens, keeps_end=task.keeps_end, **limits)


def shapes_of(config: Config, rows: TokenRows | Continued) -> Shapes:
    """The shapes of unpacked batches of these rows."""
    buckets = config.data.buckets
    return rows.shapes(buckets) if isinstance(rows, Continued) else find_shapes(rows, buckets)
