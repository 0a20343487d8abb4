"""Parallel prompts as ids: as they should be, and as Lens' authors' code has them.

The authors' code (`lens.recipe='paper_code'`) probes under a system prompt, tokenizes the filled-in
template once more with special tokens (so that BOS is doubled), cuts on the right, in float16, in
batches of 50 whose remainder is dropped, all padded to the language's longest, and takes the last
slot whatever it holds: padding on the right sees the prompt there, not itself. It trains under an
empty system prompt (Phi-3.5: under that of the probe). It writes templates out by hand, without the
dates of Llama 3.1's, and keeps a prompt's last line ends. Its mean over a prompt is not masked, but
its prompts run one by one, where there is nothing to mask.
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
from jaxfusion.lens.model import Model
from jaxfusion.lens.probe import Probe, Sums
from jaxfusion.sharding.rules import replicated

AS_WRITTEN = SimpleNamespace(start=[])  # in the tokenizers' place: rows that hold their start
logger = logging.getLogger(__name__)
Rows = dict[str, list[TokenRow]]

AUTHORS_SYSTEM, AUTHORS_BATCH = "You are a helpful assistant.", 50
AUTHORS_DATES = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n")
PADDED_BATCH = 64  # 50 rows divide on few meshes
AUTHORS_PROBED, AUTHORS_TRAINED = 64, 128  # tokens that are left of a prompt


def training_rows(
    config: LensRunConfig, model: Model, texts: dict[str, list[str]],
    answers: list[str] | None = None,
) -> tuple[Rows, Tokenizers]:
    """The prompts to train on, by language, with their answers for supervised tuning (which has no
    recipe of the authors); and the tokenizers that know what comes before them.

    Raises:
      InputError: a prompt of which nothing is left.
    """
    if config.lens.recipe == "paper_code" and answers is None:
        system = AUTHORS_SYSTEM if model.bridge.decoder.config.family == "phi3" else ""
        return {name: [TokenRow([], ids, []) for ids in authors_ids(
                    model.tokenizers, prompts, system, AUTHORS_TRAINED, again=False)]
                for name, prompts in texts.items()}, AS_WRITTEN
    return prompt_rows(config, model, texts, answers), model.tokenizers


def prompt_rows(
    config: LensRunConfig, model: Model, texts: dict[str, list[str]],
    answers: list[str] | None = None,
) -> Rows:
    """Prompts as rows, by language; too long ones lose their beginning, which is said.

    Raises:
      InputError: a prompt of which nothing is left.
    """
    found, most = {}, config.data.max_tokens
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
            raise InputError(f"{config.data.path}: of row {empty[0]} in '{name}' no token is left; "
                             "mend the row, or set data.max_tokens higher")
        if cut.any:
            logger.warning("%s: %d prompts are cut at %d tokens", name, cut.queries + cut.texts,
                           most)
        found[name] = rows
    return found


def authors_ids(
    tokenizers: Tokenizers, prompts: list[str], system: str, most: int, again: bool
) -> list[list[int]]:
    """Ids of prompts in the chat template under a system prompt, cut on the right.

    Args:
      again: tokenizes what the template gives as the authors' probing does: with special tokens.

    Raises:
      InputError: a template that takes no system prompt.
    """
    tokenizer = tokenizers.decoder
    try:
        written = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": WORDS}],
            tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises, or that there is none
        raise InputError("lens.recipe='paper_code' needs a chat template with a system prompt: "
                         f"{first_line(error)}") from None
    if written.count(WORDS) != 1:
        raise InputError("lens.recipe='paper_code' needs a chat template that takes a user's words "
                         f"as they are, once; it gives {written!r}")
    written = AUTHORS_DATES.sub("", written)
    texts = [written.replace(WORDS, prompt) for prompt in prompts]
    return [ids[:most] for ids in tokenizer(texts, add_special_tokens=again)["input_ids"]]


def probe_as_authors(model: Model, texts: dict[str, list[str]]) -> Probe:
    """A probe of the LLM as the authors' code makes it.

    Raises:
      InputError: fewer prompts than one of its batches has.
    """
    decoder = model.bridge.decoder.clone(dtype=jnp.float16, attention="plain")

    @jax.jit
    def read(params, tokens, segments):
        params = {"params": params}  # cast block by block: a whole copy would need a larger GPU
        last = jnp.zeros(tokens.shape).at[:, -1].set(1.0)[:, None]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embedded = decoder.apply(params, tokens, method="embed")
        # The last slot is read, be it padding: it sees the prompt, and nothing sees it.
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
        one = Sums()
        for tokens, segments in _authors_batches(ids, model.tokenizers.decoder):
            one.add(np.asarray(read(model.params["decoder"], tokens, segments), np.float64))
        sums.append(one)
    return Sums.probe(tuple(texts), sums)


def _authors_batches(ids: list[list[int]], tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and segments of whole batches, padded on the tokenizer's own side."""
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
