"""Generation: token ids in, token ids and log-probs out, from the vLLM server of `vllm_server`.

No tokenizer is involved. This module imports neither vLLM nor Megatron.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from siren_megatron.batch import Sample
from siren_megatron.rollout.http_json import bearer, error_text
from siren_megatron.rollout.server import RolloutError, RolloutServer, ServerFailed
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


def prompt_seed(seed: int, prompt_index: int) -> int:
    """Seed of one prompt's request, in [0, 2**62): prompts must not share their random numbers."""
    digest = hashlib.blake2b(f"{seed}:{prompt_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


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
    """

    def __init__(
        self,
        url: str,
        request_timeout_s: float,
        max_in_flight: int,
        *,
        server: RolloutServer | None = None,
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
        self.num_retries = self.num_dropped = 0
        self._server = server
        self._model = model if server is None else server.name
        self._api_key = api_key if server is None else server.api_key

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seed: int,
        stop_token_ids: Sequence[int],
        stream_ids: Sequence[int] | None = None,
        may_drop: bool = False,
        on_group: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """Sample num_samples responses to every prompt.

        The same arguments and weights give the same tokens, up to the last bit of the logits: how vLLM
        batches the sequences can move a probability by its rounding error.

        Args:
            prompts: token ids of each prompt.
            num_samples: responses a prompt.
            max_tokens: longest response, in tokens.
            temperature: sampling temperature; 0 = greedy (then num_samples has to be 1).
            top_p: nucleus of the sampling distribution, in (0, 1].
            seed: any integer; sample i of prompt k draws from a stream of its own.
            stop_token_ids: tokens that end a response, as its last token; only max_tokens ends one else.
            stream_ids: number of each prompt's random stream; None = their positions. A part of a list asked
                for with the numbers it has there gets what the whole list would give it.
            may_drop: give up a prompt whose request ran past its time again and again while the server works.
            on_group: called in this thread with (prompt index, its samples) as soon as a prompt is done,
                in the order in which prompts finish.

        Returns:
            One list of num_samples samples a prompt, in the order of prompts; empty for a dropped prompt.

        Raises:
            ValueError: an argument is out of range.
            ServerFailed: the server died, or generates nothing any more.
            RolloutError: it refused a request, gave an unusable answer, or took too long for a prompt that
                may not be dropped.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it has to be at least 1")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it has to be at least 1")
        if temperature < 0 or (temperature == 0 and num_samples > 1):
            raise ValueError(f"temperature is {temperature}; it has to be positive for {num_samples} samples")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it has to be in (0, 1]")
        for index, prompt in enumerate(prompts):
            self._check_prompt(index, prompt, max_tokens)
        common = {
            "model": self._model,
            "n": num_samples,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        streams = range(len(prompts)) if stream_ids is None else stream_ids
        seeds = [prompt_seed(seed, stream) for stream in streams]
        if len(seeds) != len(prompts):
            raise ValueError(f"stream_ids has {len(seeds)} numbers for {len(prompts)} prompts")
        lists = [list(prompt) for prompt in prompts]
        return asyncio.run(self._generate(lists, common, seeds, may_drop, on_group))

    def _check_prompt(self, index: int, prompt: Sequence[int], max_tokens: int) -> None:
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

    async def _generate(
        self,
        prompts: list[list[int]],
        common: dict[str, Any],
        seeds: Sequence[int],
        may_drop: bool,
        on_group: Callable[[int, list[Sample]], None] | None,
    ) -> list[list[Sample]]:
        import aiohttp

        groups: list[list[Sample]] = [[] for _ in prompts]
        waiting = iter(enumerate(prompts))

        async def worker(session: aiohttp.ClientSession) -> None:
            for index, prompt in waiting:
                body = {**common, "prompt": prompt, "seed": seeds[index]}
                answer = await self._ask_in_time(session, index, body)
                if answer is _DROPPED:
                    if not may_drop:
                        times = 1 + self.request_retries
                        raise _BadAnswer(
                            f"prompt {index} took longer than {self.request_timeout_s:g} s, {times} time(s)"
                        )
                    self.num_dropped += 1
                    continue
                groups[index] = parse_completion(answer, tuple(prompt), common["n"])
                if on_group is not None:
                    try:
                        on_group(index, groups[index])
                    except Exception as error:
                        raise _CallbackFailed from error

        async def watch_server() -> None:
            while self._server is None or self._server.alive():
                await asyncio.sleep(0.5)
            raise _BadAnswer("the server ended", server_failing=True)

        # A fresh session for every call: an idle connection from the last step may be half closed by now.
        settings: dict[str, Any] = {
            # A connection for each request: the server closes idle ones, perhaps just as one is used again.
            "connector": aiohttp.TCPConnector(limit=0, force_close=True),
            "timeout": aiohttp.ClientTimeout(total=self.request_timeout_s),
            "headers": bearer(self._api_key),
        }
        async with aiohttp.ClientSession(self.url, **settings) as session:
            tasks = [
                asyncio.create_task(worker(session)) for _ in range(min(self.max_in_flight, len(prompts)))
            ]
            watcher = asyncio.create_task(watch_server())
            work = asyncio.gather(*tasks)
            try:
                await asyncio.wait([work, watcher], return_when=asyncio.FIRST_COMPLETED)
                (work if work.done() else watcher).result()
            except _CallbackFailed as failed:
                assert failed.__cause__ is not None
                raise failed.__cause__ from None
            except asyncio.TimeoutError as error:
                raise ServerFailed(
                    f"a request to {self.url} took longer than {self.request_timeout_s:g} s, and so did one "
                    f"for a single token{self._log_hint()}"
                ) from error
            except (aiohttp.ClientError, OSError, json.JSONDecodeError, _BadAnswer) as error:
                if self._server is None or (isinstance(error, _BadAnswer) and not error.server_failing):
                    raise RolloutError(f"generation failed: {_one_line(error)}{self._log_hint()}") from error
                state = await asyncio.to_thread(self._server.describe_death)
                raise ServerFailed(f"generation failed: {state} ({_one_line(error)})") from error
            finally:
                for task in [*tasks, watcher]:
                    task.cancel()
                await asyncio.gather(work, watcher, return_exceptions=True)
        return groups

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
        async with session.post("/v1/completions", json=body) as response:
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


class _CallbackFailed(Exception):
    """Carries an exception of the caller's on_group past the handling of the server's errors."""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def parse_completion(
    answer: Mapping[str, Any], prompt_ids: tuple[int, ...], num_samples: int
) -> list[Sample]:
    """The samples in vLLM's answer to one prompt, in the order of their seeds.

    Args:
        answer: decoded JSON of /v1/completions.
        prompt_ids: the prompt that was asked.
        num_samples: choices that have to be there.

    Raises:
        _BadAnswer: choices are missing, cut short by the server or have no finite log-probs.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        fields = [
            (choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"])
            for choice in choices
        ]
    except (KeyError, TypeError) as error:
        raise _BadAnswer(f"the answer is not vLLM's: {error!r} in {error_text(answer)}") from error
    if len(fields) != num_samples:
        raise _BadAnswer(f"{len(fields)} responses came for a prompt, {num_samples} were asked for")
    samples = []
    for token_ids, logprobs, finish_reason in fields:
        if finish_reason not in ("stop", "length"):
            # "abort": the server is being ended.
            ending = finish_reason == "abort"
            raise _BadAnswer(
                f"vLLM ended a response with finish_reason {finish_reason!r}", server_failing=ending
            )
        if not token_ids or len(token_ids) != len(logprobs):
            raise _BadAnswer(f"a response has {len(token_ids)} tokens and {len(logprobs)} log-probs")
        if not all(value is not None and math.isfinite(value) for value in logprobs):
            raise _BadAnswer("a response has a log-prob that is not finite: the served weights may be broken")
        samples.append(Sample(prompt_ids, tuple(token_ids), tuple(logprobs), finish_reason))
    return samples
