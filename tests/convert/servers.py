"""Real and scripted OpenAI-compatible servers for tests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from launched import free_ports

STARTS = 120.0  # seconds in which a server must answer


@contextlib.contextmanager
def mlx_lm_server(model: Path, *arguments: str) -> Iterator[str]:
    """The address of a real mlx_lm.server while the block runs."""
    port = free_ports(1)
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port), *arguments]
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        end = time.monotonic() + STARTS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert process.poll() is None and time.monotonic() < end, "mlx_lm.server did not start"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


Reply = tuple[int, Any]  # status, and JSON or bytes


@contextlib.contextmanager
def scripted(reply: Callable[[str, dict[str, Any], dict[str, str]], Reply]) -> Iterator[str]:
    """The address of a server that answers as `reply(path, body, headers)` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            status, value = reply(self.path, json.loads(self.rfile.read(size) or b"{}"), dict(self.headers))
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status // 100 == 3:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
