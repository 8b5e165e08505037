"""Whether a `vllm serve` can serve a run: asked before a model is loaded, and of each server that comes back."""

import asyncio
import json
import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from grpo_stage.algorithm.refusals import apart
from grpo_stage.rollout.engines.vllm_server_client import (
    API_KEY_VARIABLE,
    RefusedError,
    ServedModel,
    ServerClient,
    UnreachableError,
    new_session,
)
from grpo_stage.rollout.engines.vllm_server_rules import logprobs_mode, serves_adapter, urls_of


SUPPORTED_VERSION = "0.23"
"""vLLM's, whose routes were read and run."""
_AS_SERVE_SAYS = "Start it as `grpo-stage serve` says"
_LIMIT_S = 30.0
_PROBED_TOKENS = (10, 20, 30, 40)
_CERTAIN, _SAME = 1e-3, 1e-2
"""Nats: a probability this close to 1 tells nothing; log-probabilities this close are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run needs of each server."""

    model: str
    """`model_name_or_path`."""
    max_model_len: int
    adapter: bool
    """Whether adapters are delivered to it; otherwise whole weights are."""
    max_lora_rank: int
    """That of the largest adapter that may be delivered."""
    folder: str
    """`output_dir`: adapters and weights are delivered as files in it."""
    over_nccl: bool = False
    """Whether whole weights are sent by vLLM's weight transfer."""
    logprobs_mode: str
    """`processed_logprobs` where sampling is neutral, otherwise `raw_logprobs`: see `VLLMSettings`."""


def wanted_of(keys: SimpleNamespace) -> Wanted:
    """What a run with these parsed keys needs."""
    return Wanted(
        model=keys.model_name_or_path,
        # To be scored, a whole completion needs room for one more token.
        max_model_len=keys.vllm_maxlen + (keys.structured_outputs is not None),
        adapter=serves_adapter(keys),
        max_lora_rank=keys.vllm_max_lora_rank if serves_adapter(keys) else 0,
        folder=keys.output_dir,
        over_nccl=keys.vllm_server_transfer == "nccl",
        logprobs_mode=logprobs_mode(keys),
    )


def check_servers(keys: SimpleNamespace, *, is_first_rank: bool) -> None:
    """Ask every server of the run whether it can serve it.

    Args:
        keys: every key of the run.
        is_first_rank: whether servers are tried out as well, which only one rank does: vLLM's engine on a CPU fails
            over the log-probabilities of a prompt while it does anything else.

    Raises:
        ValueError: naming the server, what it lacks, the reason and the remedy.
    """
    urls = urls_of(keys.vllm_server_urls)
    with ThreadPoolExecutor(1) as thread:  # this one may have an event loop already, as a notebook's has
        found = thread.submit(asyncio.run, _ask_all(urls, wanted_of(keys), is_first_rank)).result()
    for error in found:
        with apart():
            if isinstance(error, ValueError):
                raise error
    versions = {url: each for url, each in zip(urls, found, strict=True) if isinstance(each, str)}
    if len(set(versions.values())) > 1:
        shown = ", ".join(f"{url} has {version}" for url, version in versions.items())
        raise ValueError(
            f"`vllm_server_urls: {keys.vllm_server_urls}` names servers of different versions of vLLM ({shown}): what "
            "they sample and how they count would not be one policy's. Install one version for all of them."
        )


async def _ask_all(urls: Sequence[str], wanted: Wanted, is_tried: bool) -> list[str | BaseException]:
    async with new_session(os.environ.get(API_KEY_VARIABLE)) as session:
        clients = [ServerClient(session, url, _LIMIT_S) for url in urls]
        found = await asyncio.gather(
            *(inspect(client, wanted, is_tried) for client in clients), return_exceptions=True
        )
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, ValueError):
            raise error
    return found


async def inspect(client: ServerClient, wanted: Wanted, is_tried: bool = True) -> str:
    """The server's version of vLLM, after it was found to be fit, by what it says and by trying it out.

    Raises:
        ValueError: naming the server, what it lacks, the reason and the remedy.
    """
    server = f"The vLLM server {client.url} of `vllm_server_urls`"
    try:
        version = await client.version()
        if not version.startswith(f"{SUPPORTED_VERSION}."):
            raise ValueError(
                f"{server} has vLLM {version}, and this stage was run with {SUPPORTED_VERSION}: other "
                f"versions have other routes. Install vllm {SUPPORTED_VERSION} there."
            )
        base = await base_model(client, wanted.model)
        if base.max_model_len is None or base.max_model_len < wanted.max_model_len:
            raise ValueError(
                f"{server} takes up to {base.max_model_len} tokens of prompt and completion together "
                f"(`--max-model-len`), and the run needs {wanted.max_model_len} (`vllm_maxlen`, by default "
                f"`cutoff_len` and `max_new_tokens`). {_AS_SERVE_SAYS}, or lower one of them."
            )
        if not is_tried:
            return version
        await _check_delivery(client, server, wanted)
        mode = await _logprobs_mode(client, base.name)
        if mode != wanted.logprobs_mode:
            raise ValueError(
                f"{server} gives {mode or 'something that is no log-probabilities'}, and the run needs "
                f"`--logprobs-mode {wanted.logprobs_mode}`: they are compared with the trainer's and used to correct "
                f"what it learns. {_AS_SERVE_SAYS}."
            )
        return version
    except UnreachableError as error:
        raise ValueError(
            f"{server} cannot be used: {error}. Check that it runs, has finished its start, and can be reached from "
            "here; `grpo-stage serve` prints the command that starts one."
        ) from error
    except RefusedError as error:
        if error.status in (401, 403):
            raise ValueError(
                f"{server} asks for another API key. Set {API_KEY_VARIABLE} to the same value in its environment and "
                "in the run's."
            ) from error
        raise ValueError(
            f"{server} does not answer as vLLM {SUPPORTED_VERSION} does ({error}). Check the address and the port; "
            "`grpo-stage serve` prints the command that starts one."
        ) from error


async def base_model(client: ServerClient, model: str) -> ServedModel:
    """The model that the server was started with, which has to be `model`, as far as names tell.

    Raises:
        ValueError: naming both.
    """
    listed = [each for each in await client.models() if each.max_model_len is not None]
    for each in listed:
        if model in (each.name, each.root) or _is_one_folder(model, each.root):
            return each
    raise ValueError(
        f"The vLLM server {client.url} of `vllm_server_urls` serves {', '.join(each.root for each in listed)}, and "
        f"the run trains `model_name_or_path: {model}`: completions would come from another model. Start it with that "
        f"model; if it holds the same files under another path, with `--served-model-name {model}` besides."
    )


def _is_one_folder(ours: str, theirs: str) -> bool:
    return os.path.isdir(ours) and os.path.isdir(theirs) and Path(ours).samefile(theirs)


async def _check_delivery(client: ServerClient, server: str, wanted: Wanted) -> None:
    if wanted.adapter:
        if not await client.has_route("/v1/load_lora_adapter"):
            raise ValueError(
                f"{server} takes no adapters at run time, and the run delivers one after each step. {_AS_SERVE_SAYS}: "
                "with `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment."
            )
        await _check_adapters(client, server, wanted)
        return
    if not await client.has_route("/collective_rpc"):
        raise ValueError(
            f"{server} takes no weights at run time, and the run delivers all of them after each step. "
            f"{_AS_SERVE_SAYS}: with VLLM_SERVER_DEV_MODE=1 in its environment, and reachable for the run alone."
        )
    configuration = await client.configuration()
    if wanted.over_nccl and (configuration.get("weight_transfer_config") or {}).get("backend") != "nccl":
        raise ValueError(
            f"{server} was not started for `vllm_server_transfer: nccl`. {_AS_SERVE_SAYS}: with "
            '`--weight-transfer-config \'{"backend": "nccl"}\'`. Or write `vllm_server_transfer: files`.'
        )
    if configuration.get("lora_config") is not None:
        raise ValueError(
            f"{server} was started with `--enable-lora`, and vLLM cannot reload whole weights under adapters. "
            f"{_AS_SERVE_SAYS}, without it."
        )


async def _check_adapters(client: ServerClient, server: str, wanted: Wanted) -> None:
    """Offer the server the description of an adapter without weights: why it is refused tells what it would take."""
    parent = wanted.folder if os.path.isdir(wanted.folder) else None
    with tempfile.TemporaryDirectory(prefix="_served_weights-", dir=parent) as folder:
        rank = wanted.max_lora_rank
        description = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
        Path(folder, "adapter_config.json").write_text(json.dumps(description), encoding="utf-8")
        os.chmod(folder, 0o755)  # the server may run as somebody else
        try:
            await client.load_adapter("grpo-stage-no-adapter", folder)
        except RefusedError as error:
            reason = error.reason
        else:
            raise RefusedError(200, "it has loaded an adapter without weights")
    if "is not enabled" in reason:
        raise ValueError(
            f"{server} was started without `--enable-lora`, and the run delivers an adapter after each step. "
            f"{_AS_SERVE_SAYS}."
        )
    if "max_lora_rank" in reason:
        raise ValueError(
            f"{server} has no room for an adapter of rank {rank} (`vllm_max_lora_rank`, by default `lora_rank` "
            f"rounded up). {_AS_SERVE_SAYS}: with `--max-lora-rank {rank}`."
        )
    if "No adapter found" in reason:
        raise ValueError(
            f"{server} does not see {folder}, and adapters are delivered as files there. Put `output_dir: "
            f"{wanted.folder}` on a disk that the server has under the same path."
        )


async def _logprobs_mode(client: ServerClient, model: str) -> str | None:
    """What the log-probabilities of sampled tokens are, found by asking.

    With `top_k` 1 the distribution that is sampled from has one token: its processed log-probability is 0. The raw one
    is that of the same token in a prompt, which vLLM gives raw whatever the mode.
    """
    for token in _PROBED_TOKENS:
        sampling = {"max_tokens": 1, "temperature": 1.0, "ignore_eos": True, "detokenize": False}
        sampled = await client.generate(model, (token,), {**sampling, "top_k": 1, "logprobs": 0})
        scored = await client.generate(model, (token, *sampled.token_ids), {**sampling, "prompt_logprobs": 0})
        own, raw = sampled.logprobs[0], scored.prompt_logprobs[1]
        if raw is None or raw > -_CERTAIN:
            continue
        if abs(own) < _CERTAIN / 2:
            return "processed_logprobs"
        # Half precision rounds the two passes differently.
        return "raw_logprobs" if math.isclose(own, raw, rel_tol=0.05, abs_tol=_SAME) else None
    return None
