"""The guard of vLLM's endpoints, as its API server calls it."""

from __future__ import annotations

import asyncio

import pytest

from siren_megatron.rollout.auth import RequireKey

KEY = "the-key"


@pytest.fixture
def ask(monkeypatch):
    """ask(scope's changes) -> the messages sent; the guarded application answers "inside"."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)

    async def inside(scope, receive, send):
        await send("inside")

    def ask(**scope):
        sent = []

        async def send(message):
            sent.append(message)

        guard = RequireKey(inside)
        asyncio.run(guard({"type": "http", "path": "/pause", "headers": [], **scope}, None, send))
        return sent

    return ask


def bearer(value):
    return {"headers": [(b"host", b"x"), (b"authorization", value)]}


@pytest.mark.parametrize("path", ["/pause", "/collective_rpc", "/health", "/metrics", "/v1/completions", "/"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_every_path_and_method_wants_the_key(ask, path, method):
    assert ask(path=path, method=method)[0]["status"] == 401
    assert ask(path=path, method=method, **bearer(b"Bearer the-key")) == ["inside"]


@pytest.mark.parametrize(
    "value",
    [b"", b"the-key", b"Bearer ", b"Bearer the-ke", b"Bearer the-key2", b"bearer the-key", b"\xff\xfe"],
)
def test_what_is_not_the_key_is_refused(ask, value):
    assert [message.get("status") for message in ask(**bearer(value))] == [401, None]


def test_two_keys_are_none(ask):
    headers = [(b"authorization", b"Bearer the-key"), (b"authorization", b"Bearer guess")]
    assert ask(headers=headers)[0]["status"] == 401


def test_websockets_want_it_too(ask):
    assert ask(type="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert ask(type="websocket", **bearer(b"Bearer the-key")) == ["inside"]


def test_the_applications_own_start_needs_none(ask):
    assert ask(type="lifespan") == ["inside"]


def test_without_a_key_the_server_does_not_start(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is unset"):
        RequireKey(None)
