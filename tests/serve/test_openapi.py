"""Requests made from the OpenAPI document: no status that it does not have, no error of the server's own."""

import os
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.serve.scripted_engine import ScriptedEngine
from tests.serve.servers import Server, serving

CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
MAX_EXAMPLES = 60


@pytest.fixture(scope="module")
def server(demo_bundle):
    with serving(demo_bundle, engine=ScriptedEngine(), rate_limit_per_minute=0) as running:
        yield running
