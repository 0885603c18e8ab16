"""A server that speaks like ours and says what it is told: for tests of its clients, without a model.

    with FakeServer() as server:
        server.says(["Hel", "lo"])          # the pieces of the next replies
        ... server.url ... server.asked     # (path, body, headers) of every request

`kind` of a reply: "whole", "broken" (the connection ends in the middle), "error" (one in the stream), "slow"
(waits between pieces until the client goes away or 20 s have passed).
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LAYERS, EXPERTS, TOP_K = 6, 16, 4


def picture(pieces: list[str], layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K) -> dict:
    """As `moesmith.serve.experts.picture` makes it; the last expert gets nothing."""

    def experts_of(layer: int, token: int) -> list[int]:
        found = {(token * (layer + 3) + k * k) % (experts - 1) for k in range(50)}
        return sorted(found, key=lambda expert: (expert * 7 + token) % 19)[:top_k]

    chosen = [[experts_of(layer, token) for token in range(len(pieces))] for layer in range(layers)]
    counts = [[sum(e in of for of in rows) for e in range(experts)] for rows in chosen]
    weights = [[round(n and 1 / (1 + e), 3) for e, n in enumerate(row)] for row in counts]
    return {
        "layers": [f"model.layers.{i}.mlp" for i in range(layers)],
        "experts": experts,
        "top_k": [top_k] * layers,
        "counts": counts,
        "weights": weights,
        "tokens": pieces,
        "chosen": chosen,
        "chosen_tokens": len(pieces),
    }


class FakeServer:
    """Serves on a free loopback port in a thread."""

    def __init__(
        self, key: str | None = None, models: tuple[str, ...] = ("tiny", "tiny-sft"), page: str = ""
    ):
        self.key, self.models, self.page = key, models, page
        self.pieces, self.kind, self.reasoning, self.pause = ["Hello", " there."], "whole", "", 0.0
        self.status: tuple[int, str, dict[str, str]] | None = None
        self.asked: list[tuple[str, Any, dict[str, str]]] = []
        self.gone = threading.Event()
        self.replies: dict[str, list[str]] = {}
        self.shape = (LAYERS, EXPERTS, TOP_K)

    def says(self, pieces: list[str], kind: str = "whole", reasoning: str = "", pause: float = 0.0) -> None:
        self.pieces, self.kind, self.reasoning, self.pause, self.status = pieces, kind, reasoning, pause, None

    def refuses(self, status: int, message: str, **headers: str) -> None:
        """Every further chat request is answered with this."""
        self.status = status, message, headers

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of the chat requests so far."""
        return [body for path, body, _ in self.asked if path == "/v1/chat/completions"]

    def __enter__(self) -> FakeServer:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.asked.append((self.path, None, dict(self.headers)))
                if self.path.split("?")[0] == "/":
                    return self.send(200, fake.page, "text/html; charset=utf-8")
                if not self.allowed():
                    return None
                if self.path == "/v1/models":
                    return self.send(200, {"data": [{"id": name} for name in fake.models]})
                reply = fake.replies.get(self.path.rpartition("/")[2])
                if self.path.startswith("/moesmith/experts/") and reply is not None:
                    return self.send(200, picture(reply, *fake.shape))
                return self.send(404, {"error": {"message": "no such thing"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append((self.path, body, dict(self.headers)))
                if not self.allowed():
                    return
                if fake.status is not None:
                    status, message, headers = fake.status
                    self.send(status, {"error": {"message": message}}, headers=headers)
                    return
                self.stream(body)

            def allowed(self) -> bool:
                if fake.key is None or self.headers.get("Authorization") == f"Bearer {fake.key}":
                    return True
                self.send(401, {"error": {"message": "a key is wanted"}})
                return False

            def send(
                self, status: int, said: Any, kind: str = "application/json", headers: Any = None
            ) -> None:
                content = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                head = {"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})
                for name, value in head.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def stream(self, body: dict[str, Any]) -> None:
                name = f"chatcmpl-{len(fake.replies)}"
                fake.replies[name] = fake.pieces
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    self.event({"id": name, "choices": [{"index": 0, "delta": {"role": "assistant"}}]})
                    if fake.reasoning:
                        self.event(
                            {"id": name, "choices": [{"delta": {"reasoning_content": fake.reasoning}}]}
                        )
                    self.wfile.write(b": a comment\r\n\r\n")
                    for index, piece in enumerate(fake.pieces):
                        if fake.kind in ("broken", "error") and index == len(fake.pieces) // 2:
                            break
                        self.event({"id": name, "choices": [{"index": 0, "delta": {"content": piece}}]})
                        time.sleep(fake.pause)
                    if fake.kind == "error":
                        self.event({"error": {"message": "the model is out of memory"}})
                    if fake.kind == "slow":
                        for _ in range(400):
                            self.wfile.write(b": waiting\n\n")
                            time.sleep(0.05)
                    if fake.kind != "whole":
                        return
                    self.event({"id": name, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                    usage = {"prompt_tokens": 9, "completion_tokens": len(fake.pieces)}
                    self.event({"id": name, "choices": [], "usage": usage})
                    self.wfile.write(b"data: [DONE]\n\n")
                except OSError:
                    fake.gone.set()

            def event(self, data: dict[str, Any]) -> None:
                line = f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
                # Networks cut where they like: here in the middle of a character.
                cut = next((at + 1 for at, byte in enumerate(line) if byte > 127), len(line) // 2)
                for part in (line[:cut], line[cut:]):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.02 if cut != len(line) // 2 else 0)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
