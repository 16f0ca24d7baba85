"""What whoever runs a server decides: answers where nothing is asked, limits, who may come in."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ServerConfig:
    """One server. Sizes in bytes, times in seconds.

    model            the name that clients give; about, more about it for /v1/models.
    temperature ...  of answers to requests that say nothing.
    api_key          what clients must send as a bearer token; "" asks for none.
    allowed_hosts    names in the Host header beside addresses and this machine's own; "*" is any.
    allowed_origins  of pages that may call, beside the server's own, as https://example.org.
    max_queue        requests that wait for a slot; the next one is refused with 429.
    request_timeout  from a request's arrival to the end of its answer.
    send_timeout     for a client to take what was sent; it is left after that.
    read_timeout     for a client to send its headers, and then its body.
    max_connections  open at a time; more are refused with 503.
    stall_timeout    of one step of the engine, after which /health says that it fails.
    give_up_after    of nothing but failures, after which the process ends, so that whoever started
                     it may start it again; 0 is never.
    """

    model: str = "nanochat"
    about: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 2**20
    request_timeout: float = 300.0
    send_timeout: float = 30.0
    read_timeout: float = 30.0
    max_connections: int = 1000
    stall_timeout: float = 120.0
    give_up_after: float = 0.0
