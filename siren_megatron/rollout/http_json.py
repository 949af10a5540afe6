"""One HTTP call with JSON both ways, on the standard library: what a trainer asks of its vLLM server."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit


def http_json(
    url: str, method: str, path: str, body: Any = None, *, timeout_s: float, key: str | None = None
) -> tuple[int, Any]:
    """One HTTP call without proxies.

    Args:
        url: "http://host:port".
        method: "GET" or "POST".
        path: path and query.
        body: value sent as JSON, None = no body.
        timeout_s: seconds that any single wait for the server may take.
        key: sent as the bearer token; None sends none.

    Returns:
        HTTP status and the decoded JSON (or the text when it is no JSON, None when empty).

    Raises:
        OSError or http.client.HTTPException: no answer.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        data = None if body is None else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**headers, **bearer(key)})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    finally:
        connection.close()
    try:
        return response.status, json.loads(text) if text else None
    except json.JSONDecodeError:
        return response.status, text


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def error_text(answer: Any, limit: int = 300) -> str:
    """The message inside vLLM's answer to a failed call, in one line of at most limit characters."""
    if isinstance(answer, Mapping):
        error = answer.get("error", answer.get("detail", answer))
        answer = error.get("message", error) if isinstance(error, Mapping) else error
    text = " ".join(str(answer).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
