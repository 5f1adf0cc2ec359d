from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from selfimprove.testing.server import LoopbackServer, ServerScript


os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("selfimprove.testing.contracts")

settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")


def pytest_configure() -> None:
    """As models/torch_engine.py does, so that a strategy with subnormal numbers fails whatever test comes first."""
    import torch  # reads OMP_NUM_THREADS

    torch.set_flush_denormal(True)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ServerScript], LoopbackServer]]:
    """Starts servers on loopback, with a key for them in the environment; they end with the test."""
    from selfimprove.testing.server import LoopbackServer  # not before its package's assertions are rewritten

    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    servers: list[LoopbackServer] = []

    def start(script: ServerScript) -> LoopbackServer:
        servers.append(LoopbackServer(script))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
