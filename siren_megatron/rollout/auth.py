"""Inside vLLM's API server: no endpoint answers without the run's key. Loaded by --middleware.

vLLM's own check covers the paths under /v1 and a few more, and leaves open those that pause the engine, load
weights and call methods of its workers. This one covers every path and every method.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
_REFUSAL = b'{"error": "no or a wrong API key"}'


class RequireKey:
    """ASGI middleware: HTTP and WebSocket requests need ``Authorization: Bearer <VLLM_API_KEY>``.

    Args:
        app: the next ASGI application.

    Raises:
        RuntimeError: VLLM_API_KEY is unset: an open server is never what was meant.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY", "")
        if not key:
            raise RuntimeError("VLLM_API_KEY is unset: the server would be open to everyone")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # In constant time: how long a refusal takes tells nothing about the key.
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
