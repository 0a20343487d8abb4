"""The requests of OpenAI's API, as far as this server answers them; other fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from jaxfusion.serving.batcher import QUEUE
from jaxfusion.serving.engine import TOP

COLDEST = 0.001  # temperature above 0


def _encodable(text: str) -> str:
    """Refuses half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text has half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _warm(temperature: float) -> float:
    """Refuses temperatures by which logits overflow."""
    if 0 < temperature < COLDEST:
        raise ValueError(f"should be 0 (the likeliest token) or at least {COLDEST}")
    return temperature


def _only(value: Any) -> Any:
    """A field that may be given with one value alone."""
    def check(given: Any) -> Any:
        if given != value:
            raise ValueError(f"this server supports {value!r} alone")
        return given

    return AfterValidator(check)


class Request(BaseModel):
    """Base of all requests: an unknown field is an error, so that none is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: Text
    language: Text | None = None  # ours: of the text, for an encoder that is told it


class StreamOptions(BaseModel):
    """What a stream reports besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Generation(Request):
    """What completions and chats have in common."""

    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_warm)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, _only(1)] = 1
    presence_penalty: Annotated[float, _only(0)] = 0
    frequency_penalty: Annotated[float, _only(0)] = 0
    logit_bias: Annotated[dict[str, float] | None, _only({})] = {}
    user: str | None = None  # these three change no answer
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> tuple[str, ...] | None:
        """The stop strings; None: those of the task."""
        given = (self.stop,) if isinstance(self.stop, str) else self.stop
        return None if given is None else tuple(text for text in given if text)


Ids = Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)]
MaxTokens = Annotated[int, Field(ge=0)] | None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (Text | Annotated[list[Text], Field(min_length=1, max_length=QUEUE)] | Ids
             | Annotated[list[Ids], Field(min_length=1, max_length=QUEUE)])
    max_tokens: MaxTokens = None
    logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None
    echo: bool | None = None
    suffix: Annotated[str | None, _only(None)] = None
    best_of: Annotated[int | None, _only(1)] = 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt: a text or ids."""
        whole = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if whole else self.prompt


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP)] | None = None

    @property
    def most(self) -> int | None:
        """The limit under its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else (
            self.max_completion_tokens)


class ExplainRequest(Request):
    """POST /api/explain."""

    text: Text
