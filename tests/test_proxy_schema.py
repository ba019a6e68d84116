"""Whatever is sent to our own routes: no 5xx, and no answer that the published document does not know.

Left out: ``/api/events``, whose answer never ends (``test_proxy_observed.py`` reads it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llama_gpu.api.document import openapi_document
from support.fake_nvml import FakeGpu, FakeNvml, FakeProcess, build
from support.gguf_builder import write_llama
from support.proxy import running_proxy

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """A proxy with GPUs of every kind: well, lost, silent; and a server that runs."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "models").mkdir()
    write_llama(folder / "models" / "ant.gguf", seed=1)
    (folder / "models" / "broken.gguf").write_bytes(b"GGUF")
    nvml = FakeNvml(build(folder / "library"), folder)
    taken = FakeProcess(pid=1, used_bytes=None)
    silent = FakeGpu(
        used_bytes=None, utilization=None, temperature=None, power_watts=None, compute_capability=None
    )
    nvml.set_gpus([FakeGpu(processes=[taken]), silent, FakeGpu()])
    config = {"defaults": {"context_length": 512, "threads": 1}, "gpu": {"monitoring_interval": 0.2}}
    models = folder / "models"
    with running_proxy(models, config=config, environment=nvml.environment, folder=folder) as proxy:
        assert proxy.chat("ant").status_code == 200
        nvml.lose(2)
        proxy.wait_until(lambda state: state["status"] == "degraded")
        yield schemathesis.openapi.from_url(f"{proxy.url}/openapi.json")


ROUTES = [
    (method.upper(), path)
    for path, methods in openapi_document()["paths"].items()
    for method in methods
    if path != "/api/events"
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_answer_is_a_fault_or_unknown_to_the_document(
    document: schemathesis.BaseSchema, method: str, path: str
) -> None:
    @settings(
        max_examples=int(os.environ.get("LLAMA_GPU_TEST_EXAMPLES", "25")),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method].as_strategy())
    def holds(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    holds()
