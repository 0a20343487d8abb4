"""From tokens to the text of an answer, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.evaluation.scoring import read_answer
from jaxfusion.serving.engine import Token

BROKEN = "\ufffd"  # in place of a character whose bytes have not all come


@dataclass(frozen=True)
class Part:
    """What came since the part before.

    Attributes:
      prompt: the prompt's tokens, in the first part, where they were asked for.
      finish: why the answer ended: `stop` (end token or stop string) or `length`; None: it goes on.
      error: why it failed.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    prompt: tuple[Token, ...] = ()
    finish: str | None = None
    error: str | None = None

    @property
    def last(self) -> bool:
        """Whether no other part follows."""
        return self.finish is not None or self.error is not None


class Answer:
    """One answer as it grows.

    Args:
      stops: texts that end it, and are not part of it.
      most: tokens.
      strips: whether white space at both ends is left out, as in `eval.py`.
    """

    def __init__(self, tokenizers: Tokenizers, stops: Sequence[str], most: int, strips: bool):
        self.tokenizers, self.stops, self.most, self.strips = tokenizers, stops, most, strips
        self.ids, self.sent = [], ""

    def add(self, tokens: Sequence[Token]) -> Part:
        """The part that these new tokens add; those after the answer's end are left out."""
        before = len(self.ids)
        self.ids += [token.id for token in tokens][: self.most - before]
        text, ended = self._read(len(self.ids))
        if ended:
            count = next(n for n in range(before, len(self.ids) + 1) if self._read(n)[1])
            self.ids = self.ids[:count]
        finish = "stop" if ended else "length" if len(self.ids) >= self.most else None
        if finish is None:
            text = text[: len(text) - self._held(text)]
        text = text.strip() if self.strips else text
        new, self.sent = text[len(self.sent):], max(self.sent, text, key=len)
        kept = tokens[: len(self.ids) - before]
        if kept and kept[-1].id in self.tokenizers.ends:
            kept, self.ids = kept[:-1], self.ids[:-1]
        return Part(new, tuple(kept), finish=finish)

    def _read(self, count: int) -> tuple[str, bool]:
        return read_answer(self.ids[:count], self.tokenizers, self.stops)

    def _held(self, text: str) -> int:
        """How many characters at the text's end wait for what follows: half a character, or what
        may be the beginning of a stop string."""
        broken = len(text) - len(text.rstrip(BROKEN))
        begun = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1))
                 if text.endswith(stop[:n]))
        return max([broken, *begun])
