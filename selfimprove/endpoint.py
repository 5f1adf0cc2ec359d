"""The client of OpenAI-compatible servers: bounded requests, retries, time-outs, and one message for each way to fail."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from selfimprove.errors import ConfigError, ServerError

if TYPE_CHECKING:
    import openai

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Send = Callable[[str, Mapping[str, Any] | None], str]
"""Sends a body to a path below the base address (or gets it, without a body), and returns the text of a good answer."""

CHAT, COMPLETIONS, MODELS = "/chat/completions", "/completions", "/models"
MAX_BODY = 1 << 26
"""Bytes of the longest answer that is read."""
CONNECT = 10.0
"""Seconds in which a server takes a connection, or is not there."""
_KEPT = ("location", "retry-after", "retry-after-ms", "x-should-retry")
_NO_ROOM = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)
"""What vLLM, SGLang, llama.cpp and OpenAI say of a request that is longer than their context."""


class Endpoint:
    """A model behind an OpenAI-compatible server.

    A request is sent again, after pauses that grow, while the server cannot be reached, hangs, is busy (408, 409, 429) or fails
    (5xx); other refusals are final. Redirects are not followed. Nothing is read from the environment but the key (and the
    proxies of the system), and no message holds it.

    Args:
        who: what messages call the server.
        group: the config group whose options the messages name.
        base_url: the address that the paths follow, such as ``http://localhost:8000/v1``.
        model: the name of the model.
        api_key_env: the variable of the environment that holds the key; None for a server without keys.
        max_in_flight: requests at one time.
        timeout: seconds to wait for an answer, and then for its end; for a connection at most `CONNECT`.
        retries: how often a request is sent again.

    Raises: ConfigError, for options that cannot work and a key that is missing.
    """

    def __init__(
        self, who: str, group: str, base_url: str, model: str, api_key_env: str | None, max_in_flight: int, timeout: float, retries: int
    ) -> None:
        if not _is_address(base_url):
            raise ConfigError(f"{group}.base_url={_shown(base_url)!r} is not an address; give one such as http://localhost:8000/v1")
        if "@" in urlsplit(base_url).netloc or "?" in base_url or "#" in base_url:
            raise ConfigError(
                f"{group}.base_url={_shown(base_url)!r} holds a user, a password or a query, and keys come from the environment only; give the bare "
                f"address, and name the variable that holds the key as {group}.api_key_env"
            )
        if not model:
            raise ConfigError(f"{group}.model is empty; name a model that the server offers")
        for option, value, least in (("max_in_flight", max_in_flight, 1), ("retries", retries, 0)):
            if value < least:
                raise ConfigError(f"{group}.{option}={value} is too small; give at least {least}")
        if timeout <= 0:
            raise ConfigError(f"{group}.timeout={timeout} is too small; give seconds above 0")
        if api_key_env and not os.environ.get(api_key_env):
            raise ConfigError(
                f"{who} needs a key in the environment variable {api_key_env}, which is not set; "
                f"export {api_key_env}=…, or set {group}.api_key_env=null for a server without keys"
            )
        if api_key_env and not (os.environ[api_key_env].isascii() and os.environ[api_key_env].isprintable()):
            raise ConfigError(f"the environment variable {api_key_env} holds a line break or letters that no key has; set it again")
        self.who, self.group, self.base_url, self.model = who, group, base_url, model
        self.api_key_env, self.max_in_flight, self.timeout, self.retries = api_key_env, max_in_flight, timeout, retries

    def each(self, ask: Callable[[Send, Item], Answer], items: Sequence[Item]) -> list[Answer]:
        """What `ask` makes of every item, in order, a few at a time. The first failure spares the server the rest.

        Raises: ServerError, and whatever `ask` raises.
        """
        stop = threading.Event()

        with self._client() as client:

            def send(path: str, body: Mapping[str, Any] | None) -> str:
                return self._send(client, path, body)

            def one(item: Item) -> Answer:
                if stop.is_set():
                    raise ServerError("not sent, because another request failed")
                try:
                    return ask(send, item)
                except BaseException:
                    stop.set()
                    raise

            with ThreadPoolExecutor(self.max_in_flight) as pool:
                try:
                    return list(pool.map(one, items))  # started in order, so what was not sent comes after what failed
                except BaseException:
                    stop.set()
                    raise

    def send(self, path: str, body: Mapping[str, Any] | None = None, retries: int | None = None) -> str:
        """The answer to one request. Raises: ServerError."""
        with self._client() as client:
            return self._send(client if retries is None else client.with_options(max_retries=retries), path, body)

    def alien(self, answer: str, wanted: str) -> ServerError:
        """The error of an answer that is not what was wanted."""
        return ServerError(f"{self.who} at {self.base_url} answers, but not with {wanted}: {self.clip(answer)}; does the address lack /v1?")

    def _send(self, client: openai.OpenAI, path: str, body: Mapping[str, Any] | None) -> str:
        import openai

        try:
            return client.get(path, cast_to=str) if body is None else client.post(path, body=body, cast_to=str)
        except openai.OpenAIError as error:
            raise self._explained(error, path, body or {}) from error

    def _client(self) -> openai.OpenAI:
        import openai  # slow to import, and few runs need it

        key = os.environ.get(self.api_key_env, "") if self.api_key_env else "none"
        client = openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=self.retries, http_client=self._http_client())
        client.organization = client.project = None  # the environment's, which are nobody else's business
        return client

    def _http_client(self) -> Any:
        """A client that reads an answer whole, as far as its time and `MAX_BODY` go, and takes it for UTF-8."""
        import httpx

        timeout = self.timeout

        class Bounded(httpx.Client):
            def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
                response = super().send(request, **{**options, "stream": True})
                try:
                    body, end = bytearray(), time.monotonic() + timeout
                    for chunk in response.iter_bytes():
                        body += chunk
                        if len(body) > MAX_BODY:
                            raise httpx.RemoteProtocolError(f"an answer of more than {MAX_BODY >> 20} MiB", request=request)
                        if time.monotonic() > end:
                            raise httpx.ReadTimeout(f"an answer of more than {timeout} s", request=request)
                finally:
                    response.close()
                kept = {name: response.headers[name] for name in _KEPT if name in response.headers}
                return httpx.Response(response.status_code, headers=kept, content=bytes(body), request=request)

        secure = not self.base_url.lower().startswith("http:")  # reading the certificates takes longer than most answers
        waits = httpx.Timeout(timeout, connect=min(timeout, CONNECT))
        return Bounded(timeout=waits, verify=secure, follow_redirects=False, limits=httpx.Limits(max_connections=None))

    def _explained(self, error: openai.OpenAIError, path: str, body: Mapping[str, Any]) -> ServerError:
        """What a user can do about a failed request."""
        import httpx
        import openai

        place, group, tried = f"{self.who} at {self.base_url}", self.group, f"{self.retries + 1} times"
        if isinstance(error, openai.APITimeoutError) and not isinstance(error.__cause__, httpx.ConnectTimeout):
            return ServerError(f"{place} did not answer within {self.timeout} s, {tried}; raise {group}.timeout or lower {group}.max_in_flight")
        if not isinstance(error, openai.APIStatusError):
            why = self.clip(str(error.__cause__ or error))
            return ServerError(f"{place} cannot be reached (tried {tried}: {why}); start the server, or correct {group}.base_url")
        status, said = error.status_code, self.clip(error.response.text)
        match status:
            case 401 | 403:
                text = f"refuses the key; set a valid one in the environment variable {self.api_key_env or f'that {group}.api_key_env names'}"
            case 404 | 405:
                text = f"knows no model {body.get('model', self.model)!r}, or has no {path} ({said}); correct {group}.model or {group}.base_url"
            case 400 | 413 | 422 if _NO_ROOM.search(error.response.text):
                asked = _prompt(body)
                text = (
                    f"has no room in its context for a prompt of {len(asked)} characters and max_tokens={body.get('max_tokens')} ({said}): "
                    f"{self.clip(asked)}; shorten the prompt, lower max_tokens, or start the server with a longer context"
                )
            case _ if status < 400:
                text = f"redirects to {self.clip(_shown(error.response.headers.get('location', '')))}; set {group}.base_url to where it is"
            case _ if status < 500 and status != 429:
                text = f"refuses with {status}: {said}; change what it refuses"
            case _:
                text = f"failed with {status}: {said}; try later, or lower {group}.max_in_flight"
        return ServerError(f"{place} {text}", status)

    def clip(self, text: str) -> str:
        """The beginning of what a server said, without the key, which it may have said too."""
        key = os.environ.get(self.api_key_env, "") if self.api_key_env else ""
        text = text.replace(key, "[the key]") if key else text
        return repr(text if len(text) <= 200 else text[:200] + "…")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote, as a completion or in a chat."""

    text: str
    tokens: int | None
    """As the server counts them; None where it does not say, or not sensibly."""
    cut: bool
    """Whether the limit on tokens ended it."""


def read_reply(answer: str) -> Reply:
    """The first choice of a completion or of a chat. Raises: ValueError, where it is neither."""
    body = read_json(answer)
    match body:
        case {"choices": [{"text": str() as text} as choice, *_]}:
            pass
        case {"choices": [{"message": {"content": str() | None as text}} as choice, *_]}:
            pass
        case _:
            raise ValueError("no completion")
    return Reply(text or "", usage(body, "completion_tokens"), choice.get("finish_reason") == "length")


def usage(body: Mapping[str, Any], count: str) -> int | None:
    """A number of tokens that an answer says it took."""
    match body.get("usage"):
        case {**counts} if type(found := counts.get(count)) is int and found >= 0:
            return found
        case _:
            return None


def read_json(answer: str) -> Any:
    """The value of a JSON text. Raises: ValueError, where it is none."""
    try:
        return json.loads(answer)
    except RecursionError as e:
        raise ValueError("nested too deep") from e


def sendable(text: str) -> str:
    """The text without halves of surrogate pairs, which no request can carry."""
    return text.encode(errors="replace").decode()


def _prompt(body: Mapping[str, Any]) -> str:
    """The text that a request asks about, all turns of a chat together."""
    return str(body["prompt"]) if "prompt" in body else "\n".join(str(m["content"]) for m in body.get("messages", []))


def _shown(url: str) -> str:
    """An address without what may be a secret, for messages: user, password and query."""
    return re.sub(r"([?#]).*", r"\1…", re.sub(r"^(\w+://)?.*@", r"\1…@", url, flags=re.DOTALL), flags=re.DOTALL)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("idna")
        return parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:
        return False
