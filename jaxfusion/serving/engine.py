"""Answers batches of prompts on the device, a few tokens at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxfusion.data.batching import BatchShape, TokenRow, collate
from jaxfusion.evaluation.generate import CHUNK, draw_tokens, extend, read_prompts, row_keys
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.cache import Cache
from jaxfusion.serving.served import Served

ROWS = (1, 4, 16)  # sizes of a batch
SLOTS = 1 << 15  # of all rows of a batch together: a large batch of long prompts is split
STRIDE = 4  # tokens that every row gets before the host looks at them
TOP = 5  # likeliest tokens that are reported beside the chosen one
Chances = tuple[Float[Array, "B"], Int[Array, "B K"], Float[Array, "B K"]]


@dataclass(frozen=True)
class Ask:
    """One prompt and how it is answered.

    Attributes:
      most: tokens of the answer.
      temperature: 0: the likeliest token; above: drawn. top_p, seed: of what is drawn.
      number: of the prompt in its request, which seeds its samples as a row's number does.
      chances: whether log-probabilities are wanted. echo: those of the prompt, too.
    """

    row: TokenRow
    most: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    number: int = 0
    chances: bool = False
    echo: bool = False


@dataclass(frozen=True)
class Token:
    """A token's id, its log-probability, and the likeliest tokens in its place with theirs."""

    id: int
    chance: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Shape:
    """What batches are compiled for, besides their number of rows.

    Attributes:
      slots: of the encoder; 0 for the LLM alone. text: of the LLM's text. room: for new tokens.
      echo: whether the prompts' log-probabilities are computed.
    """

    slots: int
    text: int
    room: int
    echo: bool = False


@dataclass(frozen=True)
class Draws:
    """How each row's tokens are chosen; see `Ask`. `top`: whether any row wants chances."""

    temperature: Float[Array, "B"]
    top_p: Float[Array, "B"]
    seeds: Int[Array, "B"]
    numbers: Int[Array, "B"]
    top: bool


jax.tree_util.register_dataclass(
    Draws, data_fields=list(Draws.__dataclass_fields__), meta_fields=[]
)


def shape_of(ask: Ask) -> Shape:
    """The smallest shape that fits a prompt and its answer: lengths are doubled, so that few
    programs serve all."""
    query, text = len(ask.row.query), len(ask.row.text)
    return Shape(_bucket(query, 32) if query else 0, _bucket(text, 8 if query else 32),
                 _bucket(ask.most, 16, 4), ask.echo)


def _bucket(length: int, first: int, factor: int = 2) -> int:
    size = first
    while size < length:
        size *= factor
    return size


def most_rows(model: Served, shape: Shape) -> int:
    """How many prompts of a shape go together: one where a prompt's answer depends on the lengths
    of the others."""
    if model.bridge.align_padding:
        return 1
    slots = _length(model, shape) + shape.room
    return max(size for size in ROWS if size == 1 or size * slots <= SLOTS)


def _length(model: Served, shape: Shape) -> int:
    prefix = (model.bridge.latents or shape.slots) + 1 if shape.slots else 0
    return len(model.framing.start) + prefix + shape.text


def gather(model: Served, shape: Shape, rows: Sequence[TokenRow], size: int) -> Batch:
    """A batch of `size` rows with these prompts."""
    sizes = BatchShape(size, shape.slots, _length(model, shape), 1)
    return collate([[row] for row in rows], sizes, model.framing)


class Running:
    """A batch of prompts of one shape that are being answered, padded to `size` rows."""

    def __init__(self, model: Served, shape: Shape, asks: Sequence[Ask], size: int):
        self.model, self.asks, self.step = model, asks, 0
        batch = gather(model, shape, [ask.row for ask in asks], size)
        self.start, self.position = batch.dec_tokens.shape[1], batch.dec_positions.max(axis=1) + 1
        self.draws = _draws(asks, size)
        self.cache, self.logits, self.prompts = begin(
            model.params, batch, model.bridge, shape.room, model.bare, shape.echo)

    def prompt_tokens(self) -> list[list[Token]]:
        """The prompts' tokens with their log-probabilities, of a shape with `echo`; the first one
        of a prompt has none."""
        chances, ids, top = jax.device_get(self.prompts)
        found = []
        for i, ask in enumerate(self.asks):
            first, *others = ask.row.text
            found.append([Token(first), *(
                _token(token, chances[i, n], ids[i, n], top[i, n])
                for n, token in enumerate(others))])
        return found

    def advance(self, count: int = STRIDE) -> list[list[Token]]:
        """The next `count` tokens of every prompt, at most `STRIDE`."""
        count = min(count, STRIDE)
        self.cache, self.logits, *found = proceed(
            self.model.params, self.cache, self.logits, self.position + self.step,
            self.start + self.step, self.step, self.draws, count, self.model.bridge)
        self.step += count
        tokens, chances, ids, top = jax.device_get(found)
        return [[_token(tokens[i, n], chances[i, n], ids[i, n], top[i, n]) if ask.chances
                 else Token(int(tokens[i, n])) for n in range(count)]
                for i, ask in enumerate(self.asks)]


def _draws(asks: Sequence[Ask], size: int) -> Draws:
    def column(name, kind, padding):
        values = [getattr(ask, name) for ask in asks] + [padding] * (size - len(asks))
        return np.array(values, kind)

    return Draws(column("temperature", np.float32, 0), column("top_p", np.float32, 1),
                 column("seed", np.uint32, 0), column("number", np.int32, 0),
                 np.any(column("chances", bool, False)))


def _token(token, chance, ids, top) -> Token:
    return Token(int(token), float(chance), tuple(zip(ids.tolist(), top.tolist(), strict=True)))


@partial(jax.jit, static_argnames=("bridge", "room", "bare", "echo"))
def begin(
    params: Params, batch: Batch, bridge: Bridge, room: int, bare: bool, echo: bool
) -> tuple[Cache, Float[Array, "B V"], Chances | None]:
    """Reads the prompts: the cache with room for the answers, the next logits, and with `echo`
    what each slot says of the token in the next one. [B N-1], [B N-1 TOP] twice"""
    cache, hidden = read_prompts(bridge, params, batch, room, bare)
    last = jnp.argmax(batch.dec_positions, axis=1)
    final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    found = _prompt_chances(bridge, params, hidden, batch.dec_tokens) if echo else None
    return cache, bridge.logits(params, final), found


def _prompt_chances(bridge, params, hidden, tokens):
    """`chances_of` every prompt's tokens, with the logits of `CHUNK` slots at a time."""
    rows, length, width = hidden.shape
    chunks = -(-length // CHUNK)
    spare = chunks * CHUNK - length
    hidden = jnp.pad(hidden, ((0, 0), (0, spare), (0, 0))).reshape(rows, chunks, CHUNK, width)
    after = jnp.pad(tokens[:, 1:], ((0, 0), (0, spare + 1))).reshape(rows, chunks, CHUNK)

    def one(_, chunk):
        states, chosen = chunk
        return None, chances_of(bridge.logits(params, states), chosen)

    _, found = jax.lax.scan(one, None, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(after, 1, 0)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(rows, chunks * CHUNK, *x.shape[3:]) for x in found)


def chances_of(logits: Float[Array, "*B V"], chosen: Int[Array, "*B"]) -> Chances:
    """Log-probability of the chosen tokens, and ids and log-probabilities of the likeliest."""
    logits = logits.astype(jnp.float32)
    whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, ids = jax.lax.top_k(logits, TOP)
    found = jnp.take_along_axis(logits, chosen[..., None], axis=-1)
    return (found - whole)[..., 0], ids, top - whole


@partial(jax.jit, static_argnames="bridge", donate_argnames="cache")
def proceed(
    params: Params, cache: Cache, logits: Float[Array, "B V"], position: Int[Array, "B"],
    slot: Int[Array, ""], step: Int[Array, ""], draws: Draws, count: Int[Array, ""],
    bridge: Bridge,
):
    """`count` new tokens of every row: cache and logits for the next call, tokens [B STRIDE], and
    `chances_of` them (0 where no row wants them).

    Args:
      position: of the first of them in each row. slot: its place in the cache.
      step: how many tokens came before.
    """
    rows = logits.shape[0]
    found = (jnp.zeros((rows, STRIDE), jnp.int32), jnp.zeros((rows, STRIDE)),
             jnp.zeros((rows, STRIDE, TOP), jnp.int32), jnp.zeros((rows, STRIDE, TOP)))

    def one(state):
        i, cache, logits, found = state
        chosen = _choose(logits, draws, step + i)
        nothing = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), found[1:])
        chances = jax.lax.cond(draws.top, lambda: chances_of(logits, chosen), lambda: nothing)
        found = tuple(x.at[:, i].set(new)
                      for x, new in zip(found, (chosen, *chances), strict=True))
        cache, logits = extend(bridge, params, cache, chosen, position + i, slot + i)
        return i + 1, cache, logits, found

    _, cache, logits, found = jax.lax.while_loop(
        lambda state: state[0] < count, one, (0, cache, logits, found))
    return cache, logits, *found


def _choose(logits, draws: Draws, step) -> Int[Array, "B"]:
    """Each row's next token: the likeliest, or a sample as `eval.py` draws it."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = draws.temperature > 0

    def draw():
        warm = jnp.where(drawn, draws.temperature, 1.0)
        keys = row_keys(draws.seeds, draws.numbers, step)
        return jax.lax.cond(
            jnp.any(draws.top_p < 1), lambda: draw_tokens(logits, warm, draws.top_p, keys),
            lambda: draw_tokens(logits, warm, None, keys))

    return jnp.where(drawn, jax.lax.cond(jnp.any(drawn), draw, lambda: greedy), greedy)
