"""OpenAI's API: models, chats, completions; and the tokenizer, as vLLM serves it.

    GET  /v1/models  /v1/models/NAME   POST /v1/chat/completions   POST /v1/completions
    POST /tokenize  /detokenize        GET  /tokenizer_info

A conversation or prompt that does not fit the context is refused, not cut. Usage counts the tokens
that were drawn, the one that ended an answer among them.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from nanochat.infer.requests import Request
from nanochat.serve.errors import REFUSALS, ApiError
from nanochat.serve.generation import Generation, Generations
from nanochat.serve.openai_shapes import ChatShape, CompletionShape, Shape, TokenNames, event
from nanochat.serve.prompt import fit_prompt, special_tokens_parsed
from nanochat.serve.schema import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
    check_sizes,
)
from nanochat.serve.streams import EventStream, unless_left
from nanochat.text.chat_format import NO_LIMIT

DEFAULT_COMPLETION = 16  # tokens, as OpenAI has it


def prompt_of(generations: Generations, messages: Sequence[Message], max_tokens: int) -> list[int]:
    """Tokens of a conversation, with the one that begins the answer.

    max_tokens  of the prompt; the oldest turns are dropped if they do not fit.
    Raises      ApiError 400 for a conversation that cannot be answered.
    """
    check_sizes(messages)
    plain = [message.as_dict() for message in messages]
    leading = next((i for i, m in enumerate(plain) if m["role"] != "system"), len(plain))
    if leading > 1:
        text = "\n\n".join(message["content"] for message in plain[:leading])
        plain[:leading] = [{"role": "system", "content": text}]
    try:
        return fit_prompt(generations.engine.tokenizer, plain, max_tokens).tokens
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value", "messages") from error


class OpenAIApi:
    """The routes around one engine."""

    def __init__(self, generations: Generations) -> None:
        self.generations = generations
        self.config = generations.config
        self.engine = generations.engine
        self.tokenizer = self.engine.tokenizer
        self.names = TokenNames(self.tokenizer, generations.token_bytes)
        self.created = int(time.time())

    def router(self) -> APIRouter:
        """All routes; those that are no coroutines take long for a long text, and have a thread."""
        router = APIRouter(responses=REFUSALS)
        router.get("/v1/models")(self.models)
        router.get("/v1/models/{name}")(self.model)
        router.post("/v1/chat/completions")(self.chat)
        router.post("/v1/completions")(self.completion)
        router.post("/tokenize")(self.tokenize)
        router.post("/detokenize")(self.detokenize)
        router.get("/tokenizer_info")(self.tokenizer_info)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [await self.model(self.config.model)]}

    async def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        about = {"max_model_len": self.engine.capacity, **self.config.about}
        head = {"id": self.config.model, "object": "model", "created": self.created}
        return {**head, "owned_by": "nanochat", **about}

    async def chat(self, body: ChatCompletionRequest, http: HttpRequest) -> Response:
        self._check_model(body.model)
        tokens = prompt_of(self.generations, body.messages, NO_LIMIT)
        max_tokens = self._max_tokens(
            len(tokens), body.wanted_tokens, self.config.max_tokens, "messages"
        )
        requests = [
            Request(
                tokens,
                max_tokens,
                self._sampling(body, sample),
                top_logprobs=body.top_logprobs or 0,
            )
            for sample in range(body.n or 1)
        ]
        shape = ChatShape(self.names, bool(body.logprobs))
        generation = self.generations.submit(requests, body.stops)
        return await self._answer(http, generation, shape, body, len(tokens))

    async def completion(self, body: CompletionRequest, http: HttpRequest) -> Response:
        self._check_model(body.model)
        n = body.n or 1
        if len(body.prompts) * n > MAX_CHOICES:
            raise ApiError(400, f"prompts times n: at most {MAX_CHOICES}", "invalid_value", "n")
        prompts = [self._document(prompt) for prompt in body.prompts]
        wanted = DEFAULT_COMPLETION if body.max_tokens is None else body.max_tokens
        top = body.logprobs or 0
        scored = body.echo and body.logprobs is not None
        requests = [
            Request(
                tokens,
                self._max_tokens(len(tokens), wanted, wanted, "prompt"),
                self._sampling(body, sample),
                calculator=False,
                top_logprobs=top,
                prompt_logprobs=top if scored or not wanted else None,
            )
            for tokens in prompts
            for sample in range(n)
        ]
        echo = [tokens for tokens in prompts for _ in range(n)] if body.echo else None
        shape = CompletionShape(self.names, body.logprobs is not None, echo)
        generation = self.generations.submit(requests, body.stops, raw=True)
        return await self._answer(http, generation, shape, body, sum(map(len, prompts)))

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        if body.messages is not None:
            tokens = prompt_of(self.generations, body.messages, NO_LIMIT)
        else:
            assert body.prompt is not None
            parse = special_tokens_parsed if body.parse_special else type(self.tokenizer).encode
            tokens = parse(self.tokenizer, body.prompt)
            if body.add_special_tokens:
                tokens = [self.tokenizer.get_bos_token_id(), *tokens]
        return {"count": len(tokens), "max_model_len": self.engine.capacity, "tokens": tokens}

    def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self._check_tokens(body.tokens)
        return {"prompt": self.tokenizer.decode(body.tokens)}

    async def tokenizer_info(self) -> dict[str, Any]:
        """What a client needs to know to count tokens as this server does."""
        special = sorted(self.tokenizer.get_special_tokens(), key=self.tokenizer.encode_special)
        return {
            "tokenizer_class": type(self.tokenizer).__name__,
            "vocab_size": self.engine.vocab_size,
            "model_max_length": self.engine.capacity,
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "pad_token": None,
            "additional_special_tokens": special,
        }

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", "nanochat", self.config.model):
            message = f"the model {name!r} does not exist; this server has {self.config.model!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        outside = next((t for t in tokens if t >= self.engine.vocab_size), None)
        if outside is not None:
            limit = self.engine.vocab_size - 1
            raise ApiError(400, f"token {outside} is outside the vocabulary, 0 to {limit}")

    def _document(self, prompt: str | list[int]) -> list[int]:
        """Tokens of a prompt; a text begins a document."""
        if not isinstance(prompt, str):
            self._check_tokens(prompt)
            return prompt
        return [self.tokenizer.get_bos_token_id(), *self.tokenizer.encode(prompt)]

    def _max_tokens(self, num_prompt: int, wanted: int | None, default: int, param: str) -> int:
        """Tokens of an answer; what was asked for must fit the context, the default is cut."""
        # the last token of an answer need not be read by the model
        room = self.engine.capacity + 1 - num_prompt
        if room < (1 if wanted is None else wanted) or num_prompt > self.engine.capacity:
            raise ApiError(
                400,
                f"this model's context is {self.engine.capacity} tokens; the prompt has "
                f"{num_prompt}, and {wanted or 1} are wanted in the answer: shorten either",
                "context_length_exceeded",
                param,
            )
        return min(default, room) if wanted is None else wanted

    def _sampling(self, body: ChatCompletionRequest | CompletionRequest, sample: int) -> Any:
        return self.generations.sampling(
            body.temperature, body.top_k, body.top_p, body.seed, sample
        )

    async def _answer(
        self,
        http: HttpRequest,
        generation: Generation,
        shape: Shape,
        body: ChatCompletionRequest | CompletionRequest,
        num_prompt: int,
    ) -> Response:
        head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": self.config.model}

        def usage() -> dict[str, int]:
            made = generation.num_generated
            return {
                "prompt_tokens": num_prompt,
                "completion_tokens": made,
                "total_tokens": num_prompt + made,
            }

        if body.stream:
            events = _stream(generation, shape, head, usage, body.include_usage)
            return EventStream(events, generation.close, self.config.send_timeout)
        try:
            await unless_left(http, _collect(generation, shape))
        finally:
            generation.close()
        choices = [shape.whole(index) for index in range(len(generation))]
        whole = {**head, "object": shape.object, "choices": choices, "usage": usage()}
        return JSONResponse(whole)


async def _collect(generation: Generation, shape: Shape) -> None:
    async for index, piece in generation.pieces():
        shape.add(index, piece, generation.prompt(index))


async def _stream(
    generation: Generation,
    shape: Shape,
    head: dict[str, Any],
    usage: Callable[[], dict[str, int]],
    include_usage: bool,
) -> AsyncIterator[str]:
    """Chunks; the last one has the usage, if it is wanted. A failure is an event, and the last."""
    head = {**head, "object": shape.chunk_object}
    extra: dict[str, Any] = {"usage": None} if include_usage else {}
    try:
        async for index, piece in generation.pieces():
            for choice in shape.add(index, piece, generation.prompt(index)):
                yield event({**head, "choices": [choice], **extra})
        if include_usage:
            yield event({**head, "choices": [], "usage": usage()})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)
