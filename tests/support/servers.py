"""A tiny chat model behind a real server on loopback."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import torch
from fastapi import FastAPI

from nanochat.gpt import GPT, GPTConfig
from nanochat.infer.engine import Engine
from nanochat.serve.config import ServerConfig
from nanochat.serve.server import create_app
from nanochat.serve.workers import bind, server_for
from nanochat.text.tokenizer import RustBPETokenizer

CONTEXT = 256
TEXT = "hello there, what is two and three? "


def tiny_tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([TEXT * 9], 285)


def tiny_engine(num_slots: int = 2) -> Engine:
    """Answers at random, in about a millisecond a token."""
    tokenizer = tiny_tokenizer()
    model = GPT(GPTConfig(CONTEXT, tokenizer.get_vocab_size(), 1, 1, 1, 32))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Engine(model, tokenizer, num_slots)


def slowed(engine: Engine, seconds: float) -> Engine:
    """No answer ends before its length, and each token takes so long: there is time to leave."""
    engine.stop_tokens = ()
    real = engine.step

    def step() -> bool:
        time.sleep(seconds)
        return real()

    engine.step = step  # type: ignore[method-assign]
    return engine


def tiny_app(index: int) -> FastAPI:
    """As workers.py builds one in each process."""
    torch.set_num_threads(1)
    about = {"worker": index, "pid": os.getpid()}
    return create_app(slowed(tiny_engine(), 0.005), ServerConfig(about=about))


@contextlib.contextmanager
def serving(engine: Engine, config: ServerConfig) -> Iterator[tuple[str, int]]:
    """Address of a server that runs in a thread of this process."""
    app = create_app(engine, config)
    with bind("127.0.0.1", 0) as listening:
        server = server_for(app, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield "127.0.0.1", listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def idle(engine: Engine) -> bool:
    """Nothing is being answered, and nothing waits."""
    return engine.num_active == engine.num_waiting == 0
