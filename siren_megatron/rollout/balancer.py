"""One queue of prompts for all vLLM servers: the next prompt goes to the server with the fewest in flight.

A prompt carries its own seed, so its responses do not depend on which server gave them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from siren_megatron.batch import Sample
from siren_megatron.rollout.server import RolloutError, ServerFailed

if TYPE_CHECKING:
    from siren_megatron.rollout.client import RolloutClient

Replace = Callable[[int, ServerFailed], "Future[None]"]
"""(number of a client, why its server failed) -> done once another server answers to that client."""


def prompt_seed(seed: int, prompt_index: int) -> int:
    """Seed of one prompt's request, in [0, 2**62): prompts must not share their random numbers."""
    digest = hashlib.blake2b(f"{seed}:{prompt_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Balancer:
    """Generates responses with one or several servers of the same weights.

    Args:
        clients: of the servers.
        replace: how a failed server is replaced; None = its failure is raised.

    Attributes:
        num_waits, wait_s: prompts that were handed to a server, and the seconds that they had waited for one.
    """

    def __init__(self, clients: Sequence[RolloutClient], replace: Replace | None = None) -> None:
        self.clients = clients
        self.replace = replace
        self.num_waits, self.wait_s = 0, 0.0

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
        logprobs: bool = True,
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
            logprobs: whether the samples tell their tokens' log-probs; vLLM has less to do without.
            may_drop: give up a prompt whose request ran past its time again and again while the server works.
            on_group: called in this thread with (prompt index, its samples) as soon as a prompt is done,
                in the order in which prompts finish.

        Returns:
            One list of num_samples samples a prompt, in the order of prompts; empty for a dropped prompt.

        Raises:
            ValueError: an argument is out of range.
            ServerFailed: a server died, or generates nothing any more, and nothing replaces it.
            RolloutError: one refused a request, gave an unusable answer, or took too long for a prompt that
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
            self.clients[0].check_prompt(index, prompt, max_tokens)
        streams = range(len(prompts)) if stream_ids is None else stream_ids
        if len(streams) != len(prompts):
            raise ValueError(f"stream_ids has {len(streams)} numbers for {len(prompts)} prompts")
        common = {
            "n": num_samples,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": list(stop_token_ids),
            "ignore_eos": True,
            "logprobs": 0 if logprobs else None,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        requests = [
            {**common, "prompt": list(prompt), "seed": prompt_seed(seed, stream)}
            for prompt, stream in zip(prompts, streams, strict=True)
        ]
        return asyncio.run(_Call(self, may_drop, on_group).run(requests))


class _Call:
    """The state of one call of `Balancer.generate`; everything runs in its event loop."""

    def __init__(
        self, balancer: Balancer, may_drop: bool, on_group: Callable[[int, list[Sample]], None] | None
    ) -> None:
        self._balancer, self._may_drop, self._on_group = balancer, may_drop, on_group
        self._clients = balancer.clients
        self._in_flight = [0] * len(self._clients)
        self._waiting: deque[asyncio.Future[int]] = deque()

    async def run(self, requests: Sequence[Mapping[str, Any]]) -> list[list[Sample]]:
        import aiohttp

        loop = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = loop.create_future()
        # Done where a server was lost; a new future, unless it is done, says that the server is up.
        self._lost: list[asyncio.Future[None]] = [loop.create_future() for _ in self._clients]
        self._repairs: list[asyncio.Task[None]] = []
        # A connection for each request: the server closes idle ones, perhaps just as one is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            self._keepers = [asyncio.create_task(self._keep(k)) for k in range(len(self._clients))]
            tasks = [asyncio.create_task(self._answer(k, request)) for k, request in enumerate(requests)]
            work = asyncio.gather(*tasks)
            try:
                await asyncio.wait([work, self._failed], return_when=asyncio.FIRST_COMPLETED)
                groups = (work if work.done() else self._failed).result()
                # It ends with as many servers as it began with.
                await asyncio.gather(*self._repairs)
                if self._failed.done():
                    self._failed.result()
                return groups
            finally:
                others = [*self._keepers, *self._repairs]
                for task in [*tasks, *others]:
                    task.cancel()
                self._failed.cancel()
                await asyncio.gather(work, *others, self._failed, return_exceptions=True)

    async def _answer(self, index: int, request: Mapping[str, Any]) -> list[Sample]:
        """The samples of one prompt, from whichever server lives long enough."""
        while True:
            k = await self._take()
            client, lost = self._clients[k], self._lost[k]
            attempt = asyncio.create_task(client.answer(self._session, index, request))
            try:
                await asyncio.wait([attempt, lost], return_when=asyncio.FIRST_COMPLETED)
                if not attempt.done():
                    continue
                samples = attempt.result()
            except ServerFailed as failure:
                self._lose(k, failure)
                continue
            finally:
                attempt.cancel()
                self._in_flight[k] -= 1
                self._hand_out()
            if samples is None:
                if self._may_drop:
                    client.num_dropped += 1
                    return []
                times = 1 + client.request_retries
                raise RolloutError(
                    f"generation failed: prompt {index} took longer than {client.request_timeout_s:g} s, "
                    f"{times} time(s)"
                )
            if self._on_group is not None:
                self._on_group(index, samples)
            return samples

    # ---------------------------------------------------------------- the queue

    async def _take(self) -> int:
        """The number of the server with the fewest requests in flight, as soon as one has room."""
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        since = time.monotonic()
        self._waiting.append(place)
        self._hand_out()
        k = await place
        self._balancer.num_waits += 1
        self._balancer.wait_s += time.monotonic() - since
        return k

    def _hand_out(self) -> None:
        while self._waiting:
            up = [k for k in range(len(self._clients)) if not self._lost[k].done()]
            # One that was started again meanwhile may have newer weights: it helps where nobody else is left.
            oldest = min((self._clients[k].weight_version for k in up), default=0)
            up = [k for k in up if self._clients[k].weight_version == oldest]
            room = [k for k in up if self._in_flight[k] < self._clients[k].max_in_flight]
            if not room:
                return
            place = self._waiting.popleft()
            if not place.cancelled():
                k = min(room, key=lambda k: self._in_flight[k])
                self._in_flight[k] += 1
                place.set_result(k)

    # ---------------------------------------------------------------- failures

    def _lose(self, k: int, failure: ServerFailed) -> None:
        """Take a server out of the rotation; what it had in flight goes to the others at once."""
        if not self._lost[k].done():
            self._lost[k].set_result(None)
            self._repairs.append(asyncio.create_task(self._replace(k, failure)))

    async def _keep(self, k: int) -> None:
        """Notice the end of a server that breaks no connection."""
        await self._clients[k].watch()
        self._lose(k, ServerFailed("the server ended"))

    async def _replace(self, k: int, failure: ServerFailed) -> None:
        try:
            failure = await asyncio.to_thread(self._clients[k].explain, failure)
            if self._balancer.replace is None:
                raise failure
            await asyncio.wrap_future(self._balancer.replace(k, failure))
        except Exception as error:  # whatever it is, this call ends with it
            if not self._failed.done():
                self._failed.set_exception(error)
            return
        self._lost[k] = asyncio.get_running_loop().create_future()
        self._keepers.append(asyncio.create_task(self._keep(k)))
        self._hand_out()
