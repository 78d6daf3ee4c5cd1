"""Our own routes against their own description: no input makes them fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

HEADERS = {"authorization": "Bearer shop-key-1"}
LIMITED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


ROUTES = [
    *(("POST", f"/persona/v1/{name}") for name in ("events", "history", "export", "forget")),
    *(("GET", path) for path in ("/persona/v1/health", "/persona/v1/ready", "/persona/metrics")),
]


@pytest.mark.parametrize("method, path", ROUTES)
def test_no_input_makes_a_route_fail(make, keys, method, path):
    described = schemathesis.openapi.from_asgi("/persona/openapi.json", make(keys_file=keys), headers=HEADERS)
    tried = []

    @LIMITED
    @given(case=described[path][method].as_strategy())
    def every(case):
        case.headers = {k: v for k, v in (case.headers or {}).items() if k.lower() != "authorization"}
        response = case.call(headers=HEADERS)
        assert response.status_code < 500 and response.status_code != 401
        case.validate_response(response, checks=[not_a_server_error, response_schema_conformance])
        tried.append(response.status_code)

    every()
    assert 200 in tried


def test_the_description(make, call, keys):
    document = call(make(keys_file=keys), "GET", "/persona/openapi.json", headers=HEADERS).json
    assert sorted(document["paths"]) == sorted(path for _, path in ROUTES)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], path
            assert bool(operation.get("security")) == (method == "post"), path
    assert call(make(keys_file=keys), "GET", "/persona/docs", headers=HEADERS).status == 200
