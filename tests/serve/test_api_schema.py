"""Requests made up from the server's own description of its API, valid and not."""

from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from nanochat.serve.config import ServerConfig
from tests.support.servers import serving, tiny_engine

EXAMPLES = 8  # for each route: a few seconds in all
# Not every valid request can be answered: a prompt may be too long, a model have another name.
CHECKS = [
    not_a_server_error,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_breaks_the_server(mode: GenerationMode) -> None:
    config = ServerConfig(max_tokens=4, max_queue=200)
    tried: dict[str, int] = {}
    with serving(tiny_engine(num_slots=8), config) as (host, port):
        schema = schemathesis.openapi.from_url(f"http://{host}:{port}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode == GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing in these can be wrong

            @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                tried[case.operation.label] = tried.get(case.operation.label, 0) + 1
                case.call_and_validate(checks=CHECKS)

            ask()
    posts = {label for label in tried if label.startswith("POST")}
    assert len(posts) == 6, tried
    assert all(tried[label] >= EXAMPLES for label in posts), tried
