"""Tokenizes parallel prompts: correctly, or exactly as the code of Lens' authors.

The authors' code (`lens.recipe='paper_code'`) probes with a system prompt. It tokenizes the
rendered template with special tokens (which doubles BOS) and truncates on the right. It runs in
float16, in batches of 50, drops the remainder, and pads to the language's longest prompt. It reads
the last slot even if that is padding, which on the right attends to the prompt but not to itself.
It trains with an empty system prompt (Phi-3.5: that of the probe). Its hand-written templates lack
the dates of Llama 3.1's and keep a prompt's trailing line ends. Its mean over a prompt is not
masked, but its prompts run one by one, without padding.
"""

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion.data.batching import TokenRow, tokenize, tokenize_bare
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import WORDS, Tokenizers
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import LensRunConfig
from jaxfusion.lens.model import LensModel
from jaxfusion.lens.probe import Probe, Sums
from jaxfusion.sharding.rules import replicated

AS_WRITTEN = SimpleNamespace(start=[])  # replaces the tokenizers for rows that include their start
logger = logging.getLogger(__name__)
PromptRows = dict[str, list[TokenRow]]

AUTHORS_SYSTEM, AUTHORS_BATCH = "You are a helpful assistant.", 50
AUTHORS_DATES = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n")
PADDED_BATCH = 64  # few meshes divide 50 rows
AUTHORS_PROBED, AUTHORS_TRAINED = 64, 128  # prompts are truncated to this many tokens


def training_rows(
    config: LensRunConfig, model: LensModel, texts: dict[str, list[str]],
    answers: list[str] | None = None,
) -> tuple[PromptRows, Tokenizers]:
    """The training prompts by language, with answers for supervised tuning (which has no authors'
    recipe); and the tokenizers with the ids before them.

    Raises:
      InputError: a prompt without tokens.
    """
    if config.lens.recipe == "paper_code" and answers is None:
        system = AUTHORS_SYSTEM if model.bridge.decoder.config.family == "phi3" else ""
        return {name: [TokenRow([], ids, []) for ids in authors_ids(
                    model.tokenizers, prompts, system, AUTHORS_TRAINED, again=False)]
                for name, prompts in texts.items()}, AS_WRITTEN
    return prompt_rows(config, model, texts, answers), model.tokenizers


def prompt_rows(
    config: LensRunConfig, model: LensModel, texts: dict[str, list[str]],
    answers: list[str] | None = None,
) -> PromptRows:
    """Prompts as rows by language; long ones are truncated at their beginning, with a warning.

    Raises:
      InputError: a prompt without tokens.
    """
    by_language, most = {}, config.data.max_tokens
    for name, prompts in texts.items():
        examples = [Example(prompt, answer, -1) for prompt, answer in zip(
            prompts, answers or [""] * len(prompts), strict=True)]
        if model.bare:
            rows, cut = tokenize_bare(examples, model.tokenizers, most, answers is not None)
        else:
            rows, cut = tokenize(
                examples, model.tokenizers, text_prompt=model.text_prompt,
                max_encoder_tokens=most, max_decoder_tokens=most,
                with_target=answers is not None, latents=model.bridge.latents)
        if empty := [i + 1 for i, row in enumerate(rows) if not row.text and not row.query]:
            raise InputError(f"{config.data.path}: row {empty[0]} in '{name}' has no tokens; fix "
                             "the row, or set data.max_tokens higher")
        if cut.any:
            logger.warning("%s: %d prompts are truncated to %d tokens", name,
                           cut.queries + cut.texts, most)
        by_language[name] = rows
    return by_language


def authors_ids(
    tokenizers: Tokenizers, prompts: list[str], system: str, most: int, again: bool
) -> list[list[int]]:
    """Ids of prompts in the chat template with a system prompt, truncated on the right.

    Args:
      again: tokenize the rendered template with special tokens, as the authors' probing does.

    Raises:
      InputError: a template without a system prompt.
    """
    tokenizer = tokenizers.decoder
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": WORDS}],
            tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises, or a missing template
        raise InputError("lens.recipe='paper_code' needs a chat template with a system prompt: "
                         f"{first_line(error)}") from None
    if written.count(WORDS) != 1:
        raise InputError("lens.recipe='paper_code' needs a chat template with the user's words "
                         f"unchanged, once; got {written!r}")
    written = AUTHORS_DATES.sub("", written)
    texts = [written.replace(WORDS, prompt) for prompt in prompts]
    return [ids[:most] for ids in tokenizer(texts, add_special_tokens=again)["input_ids"]]


def probe_as_authors(model: LensModel, texts: dict[str, list[str]]) -> Probe:
    """A probe of the LLM as in the authors' code.

    Raises:
      InputError: fewer prompts than one of its batches.
    """
    decoder = model.bridge.decoder.clone(dtype=jnp.float16, attention="plain")

    @jax.jit
    def read(params, tokens, segments):
        params = {"params": params}  # cast block by block: a full copy would need a larger GPU
        last = jnp.zeros(tokens.shape).at[:, -1].set(1.0)[:, None]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embedded = decoder.apply(params, tokens, method="embed")
        # The last slot is read even if it is padding: it attends to the prompt, nothing to it.
        states, _ = decoder.apply(
            params, embedded, positions, segments.at[:, -1].set(1), last, key_segments=segments,
            method="states")
        return replicated(states[:, :AUTHORS_BATCH, 0])

    sums = []
    for name, prompts in texts.items():
        if len(prompts) < AUTHORS_BATCH:
            raise InputError(f"lens.recipe='paper_code' probes batches of {AUTHORS_BATCH}, got "
                             f"{len(prompts)} prompts in '{name}'")
        ids = authors_ids(model.tokenizers, prompts, AUTHORS_SYSTEM, AUTHORS_PROBED, again=True)
        language_sums = Sums()
        for tokens, segments in _authors_batches(ids, model.tokenizers.decoder):
            states = read(model.params["decoder"], tokens, segments)
            language_sums.add(np.asarray(states, np.float64))
        sums.append(language_sums)
    return Sums.probe(tuple(texts), sums)


def _authors_batches(ids: list[list[int]], tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segments of full batches, padded on the tokenizer's own side."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    left = tokenizer.padding_side == "left"
    longest = max(map(len, ids))
    for start in range(0, len(ids) - AUTHORS_BATCH + 1, AUTHORS_BATCH):
        tokens = np.full((PADDED_BATCH, longest), pad, np.int32)
        segments = np.zeros_like(tokens)
        for i, row in enumerate(ids[start : start + AUTHORS_BATCH]):
            place = slice(longest - len(row), longest) if left else slice(len(row))
            tokens[i, place], segments[i, place] = row, 1
        yield tokens, segments
