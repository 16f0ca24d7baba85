"""Requests made up from the server's own description of its API, valid and not."""

import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
)

from nanochat.serve.config import ServerConfig
from nanochat.serve.server import create_app
from tests.support.servers import tiny_engine

EXAMPLES = 12  # of each route: a few seconds in all
CHECKS = [
    not_a_server_error,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
]
