"""One vLLM server as it is asked for responses: token ids in, token ids and log-probs out.

No tokenizer is involved. This module imports neither vLLM nor Megatron.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from siren_megatron.batch import Sample
from siren_megatron.rollout.balancer import Balancer, prompt_seed
from siren_megatron.rollout.http_json import bearer, error_text
from siren_megatron.rollout.server import RemoteServer, RolloutError, RolloutServer, ServerFailed
from siren_megatron.rollout.vllm_command import ServerOptions

__all__ = [
    "RolloutClient",
    "RolloutError",
    "RolloutServer",
    "ServerFailed",
    "ServerOptions",
    "parse_completion",
    "prompt_seed",
]


_DROPPED = object()


class RolloutClient:
    """Generates responses with a running vLLM server.

    Args:
        url: the server's "http://host:port".
        request_timeout_s: seconds that one prompt's responses may take, waiting in vLLM's queue included.
        max_in_flight: requests (prompts) sent at a time; vLLM batches what it has.
        server: the server, if it is ours: its death is then noticed and described.
        model: the model's name in requests; taken from server when that is given.
        api_key: what a server that is not ours asks for; None = nothing.
        request_retries: how often a request that ran past its time is sent again before it is dropped.

    Attributes:
        num_retries, num_dropped: requests sent again and prompts given up, so far.
        num_requests, num_tokens: prompts answered and their response tokens, so far.
        weight_version: steps of training that the served weights have seen; its samples say so.
    """

    def __init__(
        self,
        url: str,
        request_timeout_s: float,
        max_in_flight: int,
        *,
        server: RolloutServer | RemoteServer | None = None,
        model: str | None = None,
        api_key: str | None = None,
        request_retries: int = 0,
    ) -> None:
        if request_timeout_s <= 0:
            raise ValueError(f"request_timeout_s is {request_timeout_s}; it has to be positive")
        if max_in_flight <= 0:
            raise ValueError(f"max_in_flight is {max_in_flight}; it has to be positive")
        self.url = url
        self.request_timeout_s = request_timeout_s
        self.max_in_flight = max_in_flight
        self.request_retries = request_retries
        self.num_retries = self.num_dropped = self.num_requests = self.num_tokens = 0
        self.weight_version = 0
        self._server: RolloutServer | RemoteServer | None = None
        self._model, self._api_key = model, api_key
        if server is not None:
            self.use(server)
            self.url = url

    def use(self, server: RolloutServer | RemoteServer) -> None:
        """From now on ask this server of ours; the counts go on."""
        self.url, self._server = server.url, server
        self._model, self._api_key = server.name, server.api_key

    def generate(self, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[Sample]]:
        """`Balancer.generate` with this server alone."""
        return Balancer([self]).generate(prompts, **arguments)

    def check_prompt(self, index: int, prompt: Sequence[int], max_tokens: int) -> None:
        """Refuse what the server would change silently or die of.

        Raises:
            ValueError: the prompt is empty, too long, or has a token outside the vocabulary.
        """
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty")
        if self._server is None:
            return
        # vLLM would lower max_tokens silently, and the response look as if it had used up its budget.
        longest = self._server.options.max_model_len
        if len(prompt) + max_tokens > longest:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_tokens {max_tokens} it does not fit, "
                f"the server's max_model_len is {longest}"
            )
        # A server without a tokenizer does not look, and such a token kills its engine.
        vocab_size = self._server.vocab_size
        if min(prompt) < 0 or (vocab_size is not None and max(prompt) >= vocab_size):
            raise ValueError(f"prompt {index} has a token outside the vocabulary, 0 to {vocab_size} - 1")

    async def answer(self, session: Any, index: int, request: Mapping[str, Any]) -> list[Sample] | None:
        """The samples of one prompt; None where it took too long, again and again.

        Args:
            session: an aiohttp session.
            index: the prompt's number, for messages.
            request: body of /v1/completions, without the model's name.

        Raises:
            ServerFailed: the server died, or generates nothing any more; `explain` tells more.
            RolloutError: it refused the request or gave an unusable answer.
        """
        import aiohttp

        version = self.weight_version
        try:
            answer = await self._ask_in_time(session, index, {"model": self._model, **request})
            if answer is _DROPPED:
                return None
            samples = parse_completion(
                answer,
                tuple(request["prompt"]),
                request["n"],
                version,
                logprobs=request["logprobs"] is not None,
            )
        except asyncio.TimeoutError as error:
            raise ServerFailed(
                f"a request to {self.url} took longer than {self.request_timeout_s:g} s, and so did one "
                f"for a single token{self._log_hint()}"
            ) from error
        except (aiohttp.ClientError, OSError, json.JSONDecodeError, _BadAnswer) as error:
            if self._server is None or (isinstance(error, _BadAnswer) and not error.server_failing):
                raise RolloutError(f"generation failed: {_one_line(error)}{self._log_hint()}") from error
            raise ServerFailed(_one_line(error)) from error
        self.num_requests += 1
        self.num_tokens += sum(len(sample.response_ids) for sample in samples)
        return samples

    async def watch(self) -> None:
        """Return once the server has ended; never where its processes are not ours to see."""
        while self._server is None or self._server.alive():
            await asyncio.sleep(0.5)

    def explain(self, failure: ServerFailed) -> ServerFailed:
        """What `answer` raised, with how the server ended; waits some seconds for a dying one."""
        if self._server is None or isinstance(failure.__cause__, TimeoutError):
            return failure
        return ServerFailed(f"generation failed: {self._server.describe_death()} ({failure})")

    async def _ask_in_time(self, session: Any, index: int, body: dict[str, Any]) -> Any:
        """The answer to one prompt's request, sent again when it takes too long, at last _DROPPED.

        Raises:
            asyncio.TimeoutError: a request for a single token takes too long as well.
        """
        for attempt in range(1 + self.request_retries):
            self.num_retries += attempt > 0
            try:
                return await self._ask(session, index, body)
            except asyncio.TimeoutError:
                continue  # vLLM gives a request up when its connection closes
        # One prompt may be too slow; an engine that hangs is too slow for any.
        await self._ask(session, index, {**body, "prompt": body["prompt"][:1], "n": 1, "max_tokens": 1})
        return _DROPPED

    async def _ask(self, session: Any, index: int, body: dict[str, Any]) -> Any:
        import aiohttp

        limit = aiohttp.ClientTimeout(total=self.request_timeout_s)
        url, headers = f"{self.url}/v1/completions", bearer(self._api_key)
        async with session.post(url, json=body, headers=headers, timeout=limit) as response:
            answer = await response.json(content_type=None)
            if response.status != 200:
                refusal = f"HTTP {response.status} for prompt {index}: {error_text(answer)}"
                raise _BadAnswer(refusal, server_failing=response.status >= 500)
            return answer

    def _log_hint(self) -> str:
        return "" if self._server is None else f"; vLLM's log: {self._server.options.log_file}"


class _BadAnswer(Exception):
    """An answer of the server that can't be used; becomes a RolloutError.

    Args:
        message: one line.
        server_failing: whether the server may be dying, so that its end is worth waiting for.
    """

    def __init__(self, message: str, *, server_failing: bool = False) -> None:
        super().__init__(message)
        self.server_failing = server_failing


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def parse_completion(
    answer: Mapping[str, Any],
    prompt_ids: tuple[int, ...],
    num_samples: int,
    weight_version: int = 0,
    *,
    logprobs: bool = True,
) -> list[Sample]:
    """The samples in vLLM's answer to one prompt, in the order of their seeds.

    Args:
        answer: decoded JSON of /v1/completions.
        prompt_ids: the prompt that was asked.
        num_samples: choices that have to be there.
        weight_version: of the weights that made them.
        logprobs: whether log-probs were asked for.

    Raises:
        _BadAnswer: choices are missing, cut short by the server or have no finite log-probs.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        fields = [
            (c["token_ids"], c["logprobs"]["token_logprobs"] if logprobs else (), c["finish_reason"])
            for c in choices
        ]
    except (KeyError, TypeError) as error:
        raise _BadAnswer(f"the answer is not vLLM's: {error!r} in {error_text(answer)}") from error
    if len(fields) != num_samples:
        raise _BadAnswer(f"{len(fields)} responses came for a prompt, {num_samples} were asked for")
    samples = []
    for token_ids, found, finish_reason in fields:
        if finish_reason not in ("stop", "length"):
            # "abort": the server is being ended.
            ending = finish_reason == "abort"
            raise _BadAnswer(
                f"vLLM ended a response with finish_reason {finish_reason!r}", server_failing=ending
            )
        if not token_ids or len(found) != len(token_ids) * logprobs:
            raise _BadAnswer(f"a response has {len(token_ids)} tokens and {len(found)} log-probs")
        if not all(value is not None and math.isfinite(value) for value in found):
            raise _BadAnswer("a response has a log-prob that is not finite: the served weights may be broken")
        samples.append(Sample(prompt_ids, tuple(token_ids), tuple(found), finish_reason, weight_version))
    return samples
