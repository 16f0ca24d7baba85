"""What clients may send, checked at the door.

OpenAI's parameters are of three kinds: those that work, those that are accepted because they ask
for what happens anyway (`frequency_penalty: 0`, `user`), and those that are refused. None is
ignored: an unknown name is an error.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from nanochat.serve.errors import ApiError

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_TOTAL_CHARS = 32_000
MAX_CHOICES = 128  # answers of one request: prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20


class Only:
    """A parameter that works only if it asks for what happens anyway; null always does."""

    def __init__(self, *values: Any) -> None:
        self.allowed = (None, *values)

    def check(self, value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in self.allowed):
            raise PydanticCustomError("unsupported", "this server does not support it")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(self.allowed)}


Unsupported = Annotated[Any, Only()]


# Members of a union are told apart before they are checked, so that errors concern only one.
def _one_or_many(value: Any) -> str:
    return "#many" if isinstance(value, list) else "#one"


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return "#text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "#token_lists"
    return "#tokens" if type(first) is int else "#texts"


class Strict(BaseModel):
    """Nothing is converted, nothing ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Part(Strict):
    """A part of a message; calls of the tool and what it said are ours, and the assistant's."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("#one")] | Annotated[list[Part], Tag("#many")],
        Discriminator(_one_or_many),
    ]
    # an answer of the API goes back into the history with these
    name: Unsupported = None
    refusal: Unsupported = None
    annotations: Annotated[Any, Only([])] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[Any, Only([])] = None

    @property
    def num_chars(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content)

    @model_validator(mode="after")
    def _parts_fit_the_role(self) -> "Message":
        parts = [] if isinstance(self.content, str) else self.content
        if self.role != "assistant" and any(part.type != "text" for part in parts):
            raise PydanticCustomError("role", "only the assistant calls tools")
        return self

    def as_dict(self) -> dict[str, Any]:
        """As nanochat/text/chat_format.py has it: texts, but for the assistant's parts."""
        if self.role == "assistant" and not isinstance(self.content, str):
            content: Any = [part.model_dump() for part in self.content]
        elif isinstance(self.content, str):
            content = self.content
        else:
            content = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


def check_sizes(messages: Sequence[Message]) -> None:
    """Raises ApiError 400 naming the limit that a conversation breaks."""
    chars = [message.num_chars for message in messages]
    for size, limit, what in (
        (max(chars, default=0), MAX_MESSAGE_CHARS, "characters in a message"),
        (sum(chars), MAX_TOTAL_CHARS, "characters in all"),
    ):
        if size > limit:
            text = f"{size:,} {what}; at most {limit:,}: shorten or restart"
            raise ApiError(400, text, "invalid_value", "messages")
    if not chars or not all(chars):
        text = "a conversation needs messages, and none of them empty"
        raise ApiError(400, text, "invalid_value", "messages")


Temperature = Annotated[float, Field(ge=0, le=2)]
NumTokens = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenList = Annotated[list[Token], Field(min_length=1)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only(False)] = None


class Generation(Strict):
    """What chats and completions share."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Annotated[
        Annotated[Stop | None, Tag("#one")]
        | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("#many")],
        Discriminator(_one_or_many),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # names of the caller, for whoever counts
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    frequency_penalty: Annotated[Any, Only(0, 0.0)] = None
    presence_penalty: Annotated[Any, Only(0, 0.0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream", "stream_options needs stream: true")
        return self


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, Only(True, False)] = None
    functions: Annotated[Any, Only([])] = None
    function_call: Annotated[Any, Only("none", "auto")] = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Annotated[Any, Only("none")] = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    store: Annotated[Any, Only(False)] = None
    metadata: Annotated[Any, Only({})] = None

    @property
    def wanted_tokens(self) -> int | None:
        """The longest answer asked for."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _parameters_agree(self) -> "ChatCompletionRequest":
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise PydanticCustomError("both", "max_tokens and max_completion_tokens: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs: true")
        return self


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("#text")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES), Tag("#texts")]
        | Annotated[list[Token], Field(min_length=1), Tag("#tokens")]
        | Annotated[list[TokenList], Field(max_length=MAX_CHOICES), Tag("#token_lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[Any, Only(1)] = None
    suffix: Unsupported = None

    @property
    def prompts(self) -> list[Any]:
        """A list of texts or of lists of tokens, however they came."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if single else list(self.prompt)


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation with the token that begins its answer.

    parse_special  names of special tokens in the text stand for these tokens.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    parse_special: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one", "give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Token]


class PlainMessage(Message):
    model_config = ConfigDict(extra="ignore", strict=False)


class ChatRequest(BaseModel):
    """POST /chat and /chat/completions, and each message of /ws; None is the server's default."""

    messages: list[PlainMessage] = Field(default=[], max_length=MAX_MESSAGES)
    message: str | None = None
    temperature: Temperature | None = None
    top_k: int | None = Field(default=None, ge=1, le=200)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=4096)
    seed: Seed | None = None
