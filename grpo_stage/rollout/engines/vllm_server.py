"""Rollouts by vLLM servers: one or several `vllm serve`, on the same or on other machines.

Every rank samples from all servers, and rank 0 alone delivers the weights: an adapter, or a whole checkpoint, as files
in a folder that the servers see too, or whole weights by vLLM's transfer. Each completion has its own seed, so that
what is sampled depends neither on the number of servers nor on which of them answers.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from grpo_stage.distributed import all_gather, process_index
from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.rollout.engines.request import EngineRequest
from grpo_stage.rollout.engines.seeds import sample_seed
from grpo_stage.rollout.engines.vllm_requests import (
    SCORING,
    refuse_long_prompts,
    sampling_arguments,
    temperature_of_logprobs,
    with_logprobs,
)
from grpo_stage.rollout.engines.vllm_server_check import Wanted, base_model, inspect, wanted_of
from grpo_stage.rollout.engines.vllm_server_client import (
    API_KEY_VARIABLE,
    RefusedError,
    ServerClient,
    TokenAnswer,
    new_session,
)
from grpo_stage.rollout.engines.vllm_server_fleet import MOST_IN_FLIGHT, Fleet, Held, Patience, Request
from grpo_stage.rollout.engines.vllm_server_rules import urls_of
from grpo_stage.rollout.engines.vllm_server_transfer import WeightTransfer
from grpo_stage.rollout.engines.weights import PolicyWeights
from grpo_stage.types import Completion, EngineLostError, FinishReason, Prompt, RolloutGroup, SamplingSettings


T = TypeVar("T")

_POLL_S = 0.1
"""How long a stop may wait to be seen."""
_GOODBYE_S = 5.0
_FOLDER = "_served_weights-"
"""Names with a `_` in front are not pushed to the hub."""


def connect(request: EngineRequest) -> "VLLMServers":
    """The engine of a run, whose servers were found to be fit.

    Raises:
        ValueError: if the trainer's model is not what the servers have read.
    """
    keys = request.keys
    wanted = wanted_of(keys)
    if wanted.adapter and request.changes_to_files:
        raise ValueError(
            f"`rollout_backend: vllm_server` is not possible: the trainer holds {keys.model_name_or_path} "
            f"{', '.join(request.changes_to_files)}, and the servers as its files have it. Save the trainer's model "
            "first and train that, or write `rollout_backend: vllm`."
        )
    return VLLMServers(
        urls_of(keys.vllm_server_urls),
        wanted,
        request.tokenizer,
        folder=keys.output_dir,
        # So long that another server has as long again, before the rollout itself counts as hanging.
        limit_s=keys.rollout_timeout / 2,
        warn=request.warn,
        scores_alone=request.device_type == "cpu",
        transfer=(
            WeightTransfer(torch.device("cuda", torch.cuda.current_device()))
            if keys.vllm_server_transfer == "nccl" and process_index() == 0
            else None
        ),
    )


class VLLMServers:
    """vLLM servers behind the protocols of an `AheadEngine` and a `ReplicatedEngine`.

    Args:
        urls: where the servers are.
        wanted: what the run needs of them.
        tokenizer: decodes completions.
        folder: weights are written into a folder of their own in it, which the servers have to see under the same
            path; where it does not exist, into a temporary one.
        limit_s: how long a server may take over one request, seconds.
        warn: told of servers that fail or come back.
        scores_alone: whether the servers compute on a CPU: one of vLLM's engines there fails, and ends, over the
            log-probabilities of a prompt under an adapter while it does anything else.
        transfer: sends whole weights; None where weights are delivered as files, and by another rank.
        patience: how long a server may be silent.
    """

    def __init__(
        self,
        urls: Sequence[str],
        wanted: Wanted,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str,
        limit_s: float,
        warn: Callable[[str], object],
        scores_alone: bool = False,
        transfer: WeightTransfer | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._wanted = wanted
        self._tokenizer = tokenizer
        self._fixed_temperature = None if wanted.logprobs_mode == "processed_logprobs" else 1.0
        self.logprob_temperature = self._fixed_temperature or math.nan
        self.on_step: Callable[[], None] = lambda: None
        self._run = uuid.uuid4().hex[:12]
        """In the name of every adapter: vLLM's prefix cache is keyed by names, and servers outlive runs."""
        self._deliveries = 0
        self._version: int | None = None
        self._submitted: tuple[tuple[Prompt, ...], SamplingSettings, concurrent.futures.Future[Any]] | None = None
        self._transfer = transfer
        self._folder = _new_folder(folder) if process_index() == 0 and transfer is None else None
        self._most_scored = 1 if scores_alone else MOST_IN_FLIGHT
        lock = f"grpo-stage-{hashlib.sha256(','.join(sorted(urls)).encode()).hexdigest()[:16]}.lock"
        self._scoring_lock = FileLock(Path(tempfile.gettempdir(), lock)) if scores_alone else contextlib.nullcontext()
        """Of all ranks, which are on one machine where they compute on a CPU."""
        self._loop = _Loop()
        self._release = weakref.finalize(self, _release, self._loop, self._folder)
        self._session = self._loop.wait(_new_session())
        clients = [ServerClient(self._session, url, limit_s) for url in urls]
        remedy = (lambda url: None) if transfer is None else transfer.remedy
        self._fleet = Fleet(clients, patience or Patience(), warn, remedy)

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        """Deliver the policy to every server that answers; those that were out take part again.

        Raises:
            ValueError: if the policy cannot be served.
            EngineLostError: if no server has taken it.
        """
        assert self._submitted is None, "sync() while a rollout is under way: collect or discard it first"
        self._version = None
        all_gather(None)  # no rank samples any more from what is replaced
        self._deliveries += 1
        error: Exception | None = None
        failed: tuple[type[Exception], str] | None = None
        weights = PolicyWeights(policy, is_adapter=self._wanted.adapter)
        if process_index() != 0:
            weights.accompany()
        else:
            try:
                if self._transfer is None:
                    self._deliver(weights)
                else:
                    self._send(weights.tensors(), self._transfer)
            except Exception as failure:  # raised below: every rank has to know of it
                error, failed = failure, (type(failure), str(failure))
        holdings, failed = all_gather((self._fleet.holdings, failed))[0]
        if error is not None:
            raise error
        if failed is not None:
            kind, text = failed
            raise (kind if kind in (ValueError, EngineLostError) else RuntimeError)(f"On rank 0: {text}")
        if process_index() != 0:
            self._fleet.adopt(holdings)
        self._version = version

    def _deliver(self, weights: PolicyWeights) -> None:
        assert self._folder is not None, "rank 0 delivers"
        name = f"grpo-stage-{self._run}-{self._deliveries}"
        folder = self._folder / name
        folder.mkdir()
        weights.write(folder)

        async def give(client: ServerClient) -> Held:
            if self._wanted.adapter:
                return await _give_adapter(client, name, folder, f"grpo-stage-{self._run}-")
            return await _give_weights(client, folder, self._wanted.model)

        self._loop.wait(self._fleet.deliver(give, lambda client: inspect(client, self._wanted)))
        # An adapter's files stay until the next one: vLLM reads them again if it has to make room in between.
        for other in self._folder.iterdir():
            if other != folder or not self._wanted.adapter:
                shutil.rmtree(other)

    def _send(self, tensors: Iterator[tuple[str, torch.Tensor]], transfer: WeightTransfer) -> None:
        fleet, wait = self._fleet, self._loop.wait

        async def greet(client: ServerClient) -> None:
            await transfer.welcome(client)
            await inspect(client, self._wanted)

        async def end(client: ServerClient) -> Held:
            instance = await transfer.end(client)
            return Held((await base_model(client, self._wanted.model)).name, instance)

        async def give_up() -> None:
            fleet.lose(transfer.give_up(), "the trainer broke the delivery off before all weights were sent")

        try:
            taking = wait(fleet.each(wait(fleet.willing(greet)), transfer.begin))
            for part in transfer.parts(tensors):
                taking = wait(fleet.each(taking, functools.partial(transfer.send, part=part)))
                del part
            fleet.hold(wait(fleet.each(taking, end)))
        except BaseException:
            wait(give_up())
            raise
        finally:
            for _ in tensors:  # which other ranks gather with this one, to the last
                pass

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        requests = self._requests(prompts, sampling, step)
        return self._groups(prompts, sampling, self._loop.wait(self._fleet.answer(requests), self.on_step))

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> None:
        requests = self._requests(prompts, sampling, step)
        assert self._submitted is None, "a rollout is under way: collect or discard it first"

        async def timed() -> tuple[list[TokenAnswer], float]:
            started = time.perf_counter()
            return await self._fleet.answer(requests), time.perf_counter() - started

        self._submitted = tuple(prompts), sampling, self._loop.begin(timed())

    def collect(self) -> tuple[list[RolloutGroup], float]:
        """See `AheadEngine.collect`. A stop is not seen here: the rollout is part of what the stopped run saves."""
        assert self._submitted is not None, "no rollout is under way"
        (prompts, sampling, answers), self._submitted = self._submitted, None
        found, seconds = self._loop.result(answers)
        return self._groups(prompts, sampling, found), seconds

    def discard(self) -> None:
        if self._submitted is not None:
            (_, _, answers), self._submitted = self._submitted, None
            self._loop.give_up(answers)

    def score(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        requests = self._scoring(groups)
        with self._scoring_lock:
            answers = self._loop.wait(self._fleet.answer(requests, self._most_scored), self.on_step)
        return _scores(groups, answers)

    def score_each(self, groups: Sequence[RolloutGroup]) -> dict[str, list[torch.Tensor]]:
        requests = self._scoring(groups)
        with self._scoring_lock:
            answers = self._loop.wait(self._fleet.answer_each(requests, self._most_scored), self.on_step)
        return {url: _scores(groups, of_server) for url, of_server in answers.items()}

    def sleep(self) -> None:
        """Nothing: the servers have devices of their own."""

    def close(self) -> None:
        self.discard()
        self._version = None
        if self._release.alive:
            concurrent.futures.wait([self._loop.begin(self._say_goodbye())], timeout=2 * _GOODBYE_S)
        self._release()

    async def _say_goodbye(self) -> None:
        """Have the servers forget this run's adapter, and let the connections go."""
        if process_index() == 0 and self._wanted.adapter:
            names = [server.held.name for server in self._fleet.up if server.held is not None]
            forgetting = (
                server.client.unload_adapter(name) for server, name in zip(self._fleet.up, names, strict=True)
            )
            with contextlib.suppress(asyncio.TimeoutError):  # the servers go on without us
                await asyncio.wait_for(asyncio.gather(*forgetting, return_exceptions=True), _GOODBYE_S)
        if self._transfer is not None:
            self._transfer.close()
        await self._session.close()

    def _requests(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[Request]:
        self._refuse_unsynced("generate")
        self.logprob_temperature = temperature_of_logprobs(self._fixed_temperature, sampling)
        refuse_long_prompts(prompts, sampling, self._wanted.max_model_len)
        return [
            Request(
                prompt.token_ids,
                sampling_arguments(prompt, sampling, sample_seed(sampling.seed, step, prompt.index, sample)),
            )
            for prompt in prompts
            for sample in range(sampling.num_generations)
        ]

    def _scoring(self, groups: Sequence[RolloutGroup]) -> list[Request]:
        self._refuse_unsynced("score")
        return [
            Request((*group.prompt.token_ids, *each.token_ids), SCORING)
            for group in groups
            for each in group.completions
        ]

    def _refuse_unsynced(self, name: str) -> None:
        if self._version is None:
            raise RuntimeError(f"{name}() was called before sync(): the servers have no policy to answer from.")

    def _groups(
        self, prompts: Sequence[Prompt], sampling: SamplingSettings, answers: Sequence[TokenAnswer]
    ) -> list[RolloutGroup]:
        assert self._version is not None
        size = sampling.num_generations
        groups = [
            RolloutGroup(
                prompt=prompt,
                completions=tuple(map(self._completion, answers[i * size : (i + 1) * size])),
                policy_version=self._version,
            )
            for i, prompt in enumerate(prompts)
        ]
        return groups if sampling.structured_outputs is None else with_logprobs(groups, self.score(groups))

    def _completion(self, answer: TokenAnswer) -> Completion:
        reason = FinishReason(answer.finish_reason)
        return Completion(
            token_ids=answer.token_ids,
            sampling_logprobs=answer.logprobs,
            finish_reason=reason,
            text=completion_text(self._tokenizer, answer.token_ids, reason),
        )


def _scores(groups: Sequence[RolloutGroup], answers: Sequence[TokenAnswer]) -> list[torch.Tensor]:
    prompts = [group.prompt for group in groups for _ in group.completions]
    return [
        torch.tensor(answer.prompt_logprobs[len(prompt.token_ids) :])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


async def _give_adapter(client: ServerClient, name: str, folder: Path, prefix: str) -> Held:
    """Hand over an adapter, have the run's earlier ones forgotten, and ask the server what it holds then."""
    try:
        await client.load_adapter(name, str(folder))
    except RefusedError as error:
        raise ValueError(
            f"The vLLM server {client.url} does not take the adapter in {folder}: {error.reason}. It has to see that "
            "folder under the same path (`output_dir` on a disk that both share), and to be started with the flags "
            "that `grpo-stage serve` prints."
        ) from error
    for each in await client.models():
        if each.name.startswith(prefix) and each.name != name:
            await client.unload_adapter(each.name)
    held = [each.name for each in await client.models() if each.name.startswith(prefix)]
    if held != [name]:
        raise RuntimeError(f"The vLLM server {client.url} was given the adapter {name} and holds {held}.")
    return Held(name)


async def _give_weights(client: ServerClient, folder: Path, model: str) -> Held:
    """Hand over a whole checkpoint. What is left of requests that nobody waits for is ended first: the prefix cache
    cannot be emptied of the keys that they use."""
    await client.pause()
    try:
        await client.reload_weights(str(folder))
        await client.reset_prefix_cache()
    except RefusedError as error:
        raise ValueError(
            f"The vLLM server {client.url} does not take the weights in {folder}: {error.reason}. It has to see that "
            "folder under the same path (`output_dir` on a disk that both share), and to be started with the flags "
            "that `grpo-stage serve` prints."
        ) from error
    finally:
        await client.resume()
    base = await base_model(client, model)
    return Held(base.name, str((await client.configuration())["instance_id"]))


async def _new_session() -> Any:
    return new_session(os.environ.get(API_KEY_VARIABLE))


class _Loop:
    """An event loop in a thread of its own, which does one thing at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-servers", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        async def in_turn() -> T:
            async with self._turn:  # what was given up before may still be ending
                return await work

        return asyncio.run_coroutine_threadsafe(in_turn(), self._loop)

    def result(self, future: "concurrent.futures.Future[T]", check: Callable[[], None] = lambda: None) -> T:
        """What comes of it, with a `check` now and then that may raise: then it is given up."""
        try:
            while True:
                done, _ = concurrent.futures.wait([future], timeout=_POLL_S)
                if done:
                    return future.result()
                check()
        except BaseException:
            self.give_up(future)
            raise

    def wait(self, work: Coroutine[Any, Any, T], check: Callable[[], None] = lambda: None) -> T:
        return self.result(self.begin(work), check)

    def give_up(self, future: "concurrent.futures.Future[Any]") -> None:
        future.cancel()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_GOODBYE_S)


def _new_folder(output_dir: str) -> Path:
    """An empty folder in that of the run; what an earlier run has left there when it was killed is removed."""
    is_there = os.path.isdir(output_dir)
    for left in Path(output_dir).glob(f"{_FOLDER}*") if is_there else ():
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=output_dir if is_there else None))
    folder.chmod(0o755)  # the servers may run as somebody else
    return folder


def _release(loop: _Loop, folder: Path | None) -> None:
    loop.stop()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
