"""A server on the loopback interface that answers as it is told, for what talks to OpenAI-compatible servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

HttpReply = tuple[int, Mapping[str, str], bytes | Iterable[bytes]]
"""Status, headers and content; content that is not bytes is sent piece by piece."""
ServerScript = Callable[[int, dict[str, Any]], HttpReply]
"""What is answered to a request: its number, and its JSON body with the ``path`` added."""


class LoopbackServer:
    """Follows a script, and keeps what it was asked.

    >>> with LoopbackServer(lambda number, request: says("yes")) as server:  # doctest: +SKIP
    ...     Judge(server.url, "m", api_key_env=None)
    """

    def __init__(self, script: ServerScript, port: int = 0) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_in_flight = 0
        self._in_flight, self._lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self, {})

            def do_POST(self) -> None:
                server._answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> LoopbackServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; a second time does nothing."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            request = {"path": handler.path, **body}
            number = len(self.requests)
            self.requests.append(request)
            self.keys.append(handler.headers["authorization"])
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            status, headers, content = self.script(number, request)
        finally:
            with self._lock:
                self._in_flight -= 1
        try:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            if isinstance(content, bytes):
                handler.send_header("content-length", str(len(content)))
            handler.end_headers()
            for piece in [content] if isinstance(content, bytes) else content:
                handler.wfile.write(piece)
                handler.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up


def says(text: str | None, tokens: int = 2) -> HttpReply:
    """A completion with this text, as an answer in a chat and to a plain prompt alike."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "text": text}
    return sends({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}})


def sends(body: object) -> HttpReply:
    """A JSON value."""
    return 200, {"content-type": "application/json"}, json.dumps(body).encode()


def fails(status: int, message: str = "no such luck") -> HttpReply:
    """An error, with the wish to be asked again at once."""
    return status, {"content-type": "application/json", "retry-after-ms": "5"}, json.dumps({"error": {"message": message}}).encode()
