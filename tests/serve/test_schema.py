"""The server against its own OpenAPI document."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode

from serve.helpers import StubDrawer, stub_offer
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits

LIMITS = Limits(images=8, steps=4, window_ms=0)
APP = create_app([stub_offer(StubDrawer(), LIMITS)], LIMITS, token="a-token.of_enough~letters")
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
HEADERS = {"Authorization": "Bearer a-token.of_enough~letters"}


@SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case: schemathesis.Case) -> None:
    response = case.call(headers=HEADERS)
    case.validate_response(response)
    assert response.status_code < 500
