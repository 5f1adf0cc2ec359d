"""The client of OpenAI-compatible servers, against servers on loopback that are busy, broken or hostile."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from selfimprove import endpoint
from selfimprove.endpoint import CHAT, Endpoint, Send, read_json, read_reply, sendable
from selfimprove.errors import ConfigError, ServerError
from selfimprove.testing import LoopbackServer
from selfimprove.testing.server import HttpReply, ServerScript, fails, says, sends

Serve = Callable[[ServerScript], LoopbackServer]


def to(url: str, **options: Any) -> Endpoint:
    return Endpoint(
        **{
            "who": "the server",
            "group": "engine",
            "base_url": url,
            "model": "m",
            "api_key_env": "OPENAI_API_KEY",
            "max_in_flight": 4,
            "timeout": 5,
            "retries": 1,
            **options,
        }
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, r"engine\.base_url='localhost:8000' is not an address"),
        ({"base_url": "http://"}, "is not an address"),
        ({"base_url": "http://[v1"}, "is not an address"),
        ({"base_url": "http://a b/v1"}, "is not an address"),
        ({"base_url": "http://host:99999/v1"}, "is not an address"),
        ({"base_url": "file:///etc/passwd"}, "is not an address"),
        ({"base_url": "http://me:sesame@host/v1"}, r"'http://…@host/v1' holds a user, a password or a query.*environment.*engine\.api_key_env"),
        ({"base_url": "http://sesame@host/v1"}, "holds a user"),
        ({"base_url": "https://host/v1?api_key=sesame"}, r"'https://host/v1\?…' holds a user, a password or a query"),
        ({"base_url": "https://host/v1#sesame"}, "holds a user"),
        ({"base_url": "me:sesame@host/v1"}, "'…@host/v1' is not an address"),
        ({"base_url": "http://me:sesame@host:99999/v1?key=sesame"}, "is not an address"),
        ({"base_url": "http://me:open?sesame@host/v1"}, "is not an address"),
        ({"model": ""}, r"engine\.model is empty"),
        ({"max_in_flight": 0}, r"engine\.max_in_flight=0 is too small"),
        ({"retries": -1}, r"engine\.retries=-1 is too small"),
        ({"timeout": 0}, r"engine\.timeout=0 is too small"),
        ({"api_key_env": "NO_KEY"}, r"NO_KEY, which is not set.*engine\.api_key_env=null"),
        ({"api_key_env": "TORN_KEY"}, r"TORN_KEY holds a line break"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("TORN_KEY", "open\nsesame")
    with pytest.raises(ConfigError, match=message) as e:
        to(**{"url": "http://127.0.0.1:1/v1", **({"url": options["base_url"]} if "base_url" in options else options)})
    assert "sesame" not in str(e.value)


def test_a_path_may_hold_an_at() -> None:
    assert to("http://127.0.0.1:1/of@me/v1", api_key_env=None).base_url == "http://127.0.0.1:1/of@me/v1"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "open sesame " * 50, "max_tokens": 8}, "This model's maximum context length is 20 tokens."),
        ({"messages": [{"role": "user", "content": "open sesame " * 50}], "max_tokens": 8}, "request (99 tokens) exceeds the available context size"),
        ({"prompt": "open sesame " * 50, "max_tokens": 8}, "context_length_exceeded"),
    ],
)
def test_a_request_that_is_too_long_is_shown(serve: Serve, body: dict[str, Any], said: str) -> None:
    server = serve(lambda n, request: fails(400, said))
    with pytest.raises(ServerError, match=r"no room in its context for a prompt of 600 characters and max_tokens=8 .*'open .*longer context") as e:
        to(server.url).send(CHAT, body)
    assert e.value.status == 400
    assert re.sub(r"\W", "", said) in re.sub(r"\W", "", str(e.value))
    assert "sesame" not in str(e.value)


def test_the_model_that_was_asked_is_the_one_that_is_named(serve: Serve) -> None:
    server = serve(lambda n, request: fails(404))
    with pytest.raises(ServerError, match="knows no model 'mine'"):
        to(server.url).send(CHAT, {"model": "mine"})


def test_answers_come_in_order_and_a_few_at_a_time(serve: Serve) -> None:
    def slow(number: int, request: dict[str, Any]) -> HttpReply:
        time.sleep(0.02 * (request["n"] % 3))
        return sends(request["n"])

    server = serve(slow)
    assert to(server.url, max_in_flight=3).each(lambda send, n: int(send("/x", {"n": n})), range(20)) == list(range(20))
    assert 1 < server.most_in_flight <= 3
    assert to(server.url).each(lambda send, n: n, []) == []


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_passes_is_asked_again(serve: Serve, status: int) -> None:
    server = serve(lambda n, request: fails(status) if n < 2 else says("yes"))
    assert "yes" in to(server.url, retries=2).send(CHAT, {})
    assert len(server.requests) == 3


def test_pauses_grow(serve: Serve) -> None:
    times: list[float] = []

    def busy(number: int, request: dict[str, Any]) -> HttpReply:
        times.append(time.monotonic())
        return 503, {}, b""

    server = serve(busy)
    with pytest.raises(ServerError, match="failed with 503"):
        to(server.url, retries=2).send(CHAT, {})
    assert times[2] - times[1] > times[1] - times[0] > 0.3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"refuses with 400: .*no such luck.*change what it refuses"),
        (401, r"refuses the key.*OPENAI_API_KEY"),
        (403, r"refuses the key.*OPENAI_API_KEY"),
        (404, r"knows no model 'm', or has no /chat/completions \(.*no such luck.*engine\.model or engine\.base_url"),
        (422, r"refuses with 422"),
    ],
)
def test_a_refusal_is_final_and_ends_the_batch(serve: Serve, status: int, message: str) -> None:
    server = serve(lambda n, request: fails(status))
    with pytest.raises(ServerError, match=message) as e:
        to(server.url, max_in_flight=1).each(lambda send, n: send(CHAT, {}), range(5))
    assert e.value.status == status
    assert len(server.requests) == 1


def test_no_message_holds_the_key(serve: Serve) -> None:
    server = serve(lambda n, request: fails(400, "your key sesame is too short"))
    with pytest.raises(ServerError, match=r"your key \[the key\] is too short") as e:
        to(server.url).send(CHAT, {})
    assert "sesame" not in str(e.value)
    assert server.keys == ["Bearer sesame"]


def test_the_environment_says_nothing_unasked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "private")
    seen: list[str] = []

    class Listening(LoopbackServer):
        def _answer(self, handler: Any, body: dict[str, Any]) -> None:
            seen.append(str(handler.headers))
            super()._answer(handler, body)

    with Listening(lambda n, request: says("yes")) as server:
        to(server.url, api_key_env=None).send(CHAT, {"model": "m"})
        assert server.requests == [{"path": "/v1/chat/completions", "model": "m"}]
    assert len(seen) == 1
    assert "private" not in seen[0]


def test_a_server_that_is_not_there(serve: Serve) -> None:
    server = serve(lambda n, request: says("yes"))
    server.close()
    with pytest.raises(ServerError, match=r"cannot be reached \(tried 2 times: .*refused.*start the server, or correct engine\.base_url"):
        to(server.url).send(CHAT, {})


def test_a_server_that_dies_in_a_batch(serve: Serve) -> None:
    server = serve(lambda n, request: says("yes"))

    def ask(send: Send, n: int) -> str:
        if n == 3:
            server.close()
        return send(CHAT, {})

    with pytest.raises(ServerError, match="cannot be reached"):
        to(server.url, max_in_flight=1, retries=0).each(ask, range(5))
    assert len(server.requests) == 3


def test_a_server_that_hangs(serve: Serve) -> None:
    hung = threading.Event()

    def hang(number: int, request: dict[str, Any]) -> HttpReply:
        hung.wait(10)
        return says("yes")

    server = serve(hang)
    begun = time.monotonic()
    try:
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 s, 2 times; raise engine\.timeout or lower engine\.max_in_flight"):
            to(server.url, timeout=0.2).send(CHAT, {})
    finally:
        hung.set()
    assert time.monotonic() - begun < 5


def test_a_server_that_drips(serve: Serve) -> None:
    def drops() -> Iterator[bytes]:
        for _ in range(200):
            time.sleep(0.05)
            yield b" "

    server = serve(lambda n, request: (200, {"content-length": "200"}, drops()))
    begun = time.monotonic()
    with pytest.raises(ServerError, match=r"did not answer within 0\.3 s"):
        to(server.url, timeout=0.3, retries=0).send(CHAT, {})
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("packed", [False, True])
def test_a_server_that_never_ends(serve: Serve, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_BODY", 1 << 20)
    body = b" " * (1 << 22)
    server = serve(lambda n, request: (200, {"content-encoding": "gzip"}, gzip.compress(body)) if packed else (200, {}, body))
    with pytest.raises(ServerError, match="an answer of more than 1 MiB"):
        to(server.url, retries=0).send(CHAT, {})


@pytest.mark.parametrize("content", [b"not gzip", b""])
def test_a_server_that_packs_badly(serve: Serve, content: bytes) -> None:
    server = serve(lambda n, request: (200, {"content-encoding": "gzip"}, content))
    try:
        assert to(server.url, retries=0).send(CHAT, {}) == ""
    except ServerError as e:
        assert "cannot be reached" in str(e)


def test_redirects_are_not_followed(serve: Serve) -> None:
    elsewhere = serve(lambda n, request: says("yes"))
    server = serve(lambda n, request: (307, {"location": f"{elsewhere.url}/x"}, b""))
    with pytest.raises(ServerError, match=rf"redirects to '{elsewhere.url}/x'; set engine\.base_url"):
        to(server.url).send(CHAT, {})
    assert elsewhere.requests == []


def test_a_redirect_shows_no_secret(serve: Serve) -> None:
    server = serve(lambda n, request: (307, {"location": "https://me:sesame@host/v1?token=sesame"}, b""))
    with pytest.raises(ServerError, match=r"redirects to 'https://…@host/v1\?…'"):
        to(server.url).send(CHAT, {})


def test_an_encoding_is_no_way_to_break_in(serve: Serve) -> None:
    server = serve(lambda n, request: (200, {"content-type": "application/json; charset=rot13"}, "\xff".encode("latin-1")))
    assert to(server.url).send(CHAT, {}) == "�"


@pytest.mark.parametrize(
    "text", ["", "null", "{", "[" * 100_000, "9" * 10_000, '{"choices": []}', '{"choices": [{"text": 3}]}', '{"choices": {"0": {}}}']
)
def test_nonsense_is_no_reply(text: str) -> None:
    with pytest.raises(ValueError):
        read_reply(text)


def test_a_nest_is_no_crash() -> None:
    with pytest.raises(ValueError):
        read_json("[" * 100_000)


@pytest.mark.parametrize("usage", [None, [], "much", {}, {"completion_tokens": -1}, {"completion_tokens": True}, {"completion_tokens": 1.5}])
def test_usage_that_says_nothing(usage: object) -> None:
    assert read_reply(json.dumps({"choices": [{"text": "x"}], "usage": usage})).tokens is None


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ({"text": "x", "finish_reason": "length"}, ("x", 2, True)),
        ({"message": {"content": "x"}, "finish_reason": "stop"}, ("x", 2, False)),
        ({"message": {"content": None, "reasoning_content": "hm"}}, ("", 2, False)),
    ],
)
def test_replies(choice: dict[str, Any], reply: tuple[str, int, bool]) -> None:
    found = read_reply(json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}))
    assert (found.text, found.tokens, found.cut) == reply


def test_half_a_character_is_not_sent() -> None:
    assert sendable("a\ud800b") == "a?b"
