"""Requests made from the OpenAPI document: nothing that it does not announce, and no error of our own."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.scripted_engine import ScriptedEngine
from tests.serve.servers import serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def api(demo_bundle):
    with serving(demo_bundle, engine=ScriptedEngine(), rate_limit_per_minute=0) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


PATHS = [
    "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/livez", "/readyz", "/health", "/metrics",
]  # fmt: skip


def test_every_path_is_tried(api):
    assert [result.ok().path for result in api.get_all_operations()] == PATHS


@pytest.mark.parametrize("path", PATHS)
def test_what_the_document_says_is_true(api, path):
    (operation,) = (result.ok() for result in api.get_all_operations() if result.ok().path == path)

    @given(case=operation.as_strategy())
    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        case.call_and_validate(checks=CHECKS)

    ask()
