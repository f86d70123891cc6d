"""A server that answers as vLLM's OpenAI server does, with a made-up model: the tests say what it knows."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """answers: request path -> function of the request's JSON that gives the answer's. requests: how many came."""

    daemon_threads = True

    def __init__(self, answers: dict[str, Callable[[dict[str, Any]], Any]], model: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = {"/v1/models": lambda _: {"data": [{"id": model}]}, **answers}
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else {}
        known = self.server.answers.get(self.path)
        if self.path != "/v1/models":
            self.server.requests += 1
        content = json.dumps(known(body) if known else {"error": f"no {self.path}"}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _answer

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(answers: dict[str, Callable[[dict[str, Any]], Any]], model: str = "made-up") -> Iterator[Server]:
    """A server on a free port that runs inside the block."""
    with Server(answers, model) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
