"""Serve a chat model: a page at http://127.0.0.1:8000/ and the API that it uses.

python -m scripts.chat_web --checkpoint=chatsft_checkpoints/latest.pt
python -m scripts.chat_web --host=0.0.0.0 --api_key=key.txt --num_workers=8
"""

import ipaddress
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro
from fastapi import FastAPI

from nanochat import command, configurator
from nanochat.common import print0
from nanochat.serve import workers
from nanochat.serve.chat_model import ChatSettings, load_chat_model
from nanochat.serve.config import ServerConfig
from nanochat.serve.server import create_app
from nanochat.settings import Count, CountOrZero, NonNegative, Positive, Range

GIVE_UP_AFTER = 60.0  # seconds of failures, where there is somebody to start a process again


@dataclass(frozen=True)
class Settings(ChatSettings):
    """Serve a chat model over HTTP, to this machine unless --host says otherwise."""

    model_name: str = "nanochat"  # what clients of the API call the model
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is every one of this machine
    port: Annotated[int, Range(0, 65_535), tyro.conf.arg(aliases=["-p"])] = 8000  # to listen on
    num_workers: Count = 1  # processes behind the port, each with the model on a GPU of its own
    num_slots: Count = 16  # answers that a process writes at a time; others wait
    max_queue: CountOrZero = 64  # requests that wait in a process; more are refused
    request_timeout: Positive = 300.0  # seconds for an answer, waiting included
    max_body_bytes: Count = 2**20  # of a request
    api_key: str = ""  # what clients must send, or a file that has it; empty asks for none
    allowed_hosts: str = ""  # names, between commas, by which clients reach this server; * is any
    allowed_origins: str = ""  # other sites whose pages may call, as https://a.org,https://b.org
    temperature: Annotated[NonNegative, tyro.conf.arg(aliases=["-t"])] = 0.8  # if none is asked
    top_k: Annotated[CountOrZero, tyro.conf.arg(aliases=["-k"])] = 50  # if none is asked
    max_tokens: Annotated[Count, tyro.conf.arg(aliases=["-m"])] = 512  # if none is asked


def main() -> None:
    settings = configurator.load(Settings)
    config = server_config(settings)
    uses_gpu = settings.device in ("auto", "cuda") and torch.cuda.is_available()
    num_gpus = torch.cuda.device_count()
    if uses_gpu and settings.num_workers > num_gpus:
        raise ValueError(
            f"--num_workers={settings.num_workers}: each needs a GPU, and there are {num_gpus}"
        )
    listening = workers.bind(settings.host, settings.port)
    url = f"http://{settings.host}:{listening.getsockname()[1]}/"
    if not config.api_key and not is_loopback(settings.host):
        print(f"{url} is open to everyone who reaches it; see --api_key", file=sys.stderr)
    print0(f"nanochat: {url}")
    build = partial(build_app, settings, config)
    sys.exit(workers.serve(build, listening, config, settings.num_workers))


def server_config(settings: Settings) -> ServerConfig:
    """What the settings say about the server.

    Raises  ValueError for an empty file of the key.
    """
    key = settings.api_key
    if key and Path(key).is_file():
        key = Path(key).read_text(encoding="utf-8").strip()
        if not key:
            raise ValueError(
                f"--api_key={settings.api_key}: the file is empty; write the key in it"
            )
    return ServerConfig(
        model=settings.model_name,
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_tokens=settings.max_tokens,
        api_key=key,
        allowed_hosts=tuple(filter(None, settings.allowed_hosts.split(","))),
        allowed_origins=tuple(filter(None, settings.allowed_origins.split(","))),
        max_queue=settings.max_queue,
        request_timeout=settings.request_timeout,
        max_body_bytes=settings.max_body_bytes,
        give_up_after=GIVE_UP_AFTER if settings.num_workers > 1 else 0.0,
    )


def build_app(settings: Settings, config: ServerConfig, index: int) -> FastAPI:
    """The application of one process."""
    # as under torchrun: LOCAL_RANK selects the GPU, and rank 0 speaks for all
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(index)
    if settings.num_workers > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.num_workers))
    chat = load_chat_model(settings, print_kernels=index == 0)
    about = {"checkpoint": "/".join(chat.path.parts[-3:]), "stage": chat.stage.name}
    return create_app(chat.engine(settings.num_slots), replace(config, about=about))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    command.run(main)
