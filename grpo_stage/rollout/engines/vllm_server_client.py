"""The HTTP routes of one `vllm serve` that a run uses. No exception of the HTTP library leaves this module."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp


API_KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that holds the servers' key: `vllm serve` reads the same one."""
_SHOWN_CHARACTERS = 500

T = TypeVar("T")


class UnreachableError(Exception):
    """The server did not answer, or answered that it has failed: another try, or another server, may do better."""


class RefusedError(Exception):
    """The server understood the request and refused it: asking again would bring the same.

    Args:
        status: the HTTP status, 400 to 499, or 500 where vLLM says of an adapter why it cannot be loaded.
        reason: the server's own words.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model or an adapter that the server lists."""

    name: str
    root: str
    """Where the server has read it from, by its own name."""
    max_model_len: int | None
    """The longest prompt and completion together; None for an adapter."""


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """What came of one request for tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the sampled tokens, as the server's `--logprobs-mode` says."""
    finish_reason: str
    prompt_logprobs: tuple[float | None, ...]
    """Of the prompt's own tokens, the first of which has none; empty unless they were asked for."""


class ServerClient:
    """One server. Its methods run in one event loop, and may run at the same time.

    Every method raises `UnreachableError` or `RefusedError`, and nothing else, where it does not succeed.

    Args:
        session: of the whole run; it carries the API key.
        url: the server's, without a path.
        limit_s: how long one request may take.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, limit_s: float) -> None:
        self.url = url
        self._session = session
        self._limit_s = limit_s

    async def version(self) -> str:
        return await self._json("GET", "/version", lambda answer: str(answer["version"]))

    async def ping(self, limit_s: float) -> None:
        """Raise unless the server answers within `limit_s` that it is well."""
        await self._text("GET", "/health", limit_s=limit_s)

    async def models(self) -> tuple[ServedModel, ...]:
        return await self._json(
            "GET",
            "/v1/models",
            lambda answer: tuple(
                ServedModel(each["id"], each["root"], each.get("max_model_len")) for each in answer["data"]
            ),
        )

    async def configuration(self) -> Mapping[str, Any]:
        """vLLM's own configuration; its `instance_id` names this start of the engine. Only with
        `VLLM_SERVER_DEV_MODE=1`."""
        return await self._json("GET", "/server_info?config_format=json", lambda answer: dict(answer["vllm_config"]))

    async def has_route(self, path: str) -> bool:
        """Whether something answers to POST at `path`; nothing is posted."""
        try:
            await self._text("GET", path)
        except RefusedError as error:
            return error.status == 405  # the path is known, and GET is not for it
        return True

    async def generate(self, model: str, token_ids: Sequence[int], sampling: Mapping[str, Any]) -> TokenAnswer:
        """Sample from `model`, or score `token_ids` under it.

        Args:
            model: the served name of the base, or of an adapter.
            token_ids: the prompt.
            sampling: vLLM's `SamplingParams`; one completion.
        """
        body = {"model": model, "token_ids": list(token_ids), "sampling_params": dict(sampling)}
        return await self._json("POST", "/inference/v1/generate", lambda answer: _answer(answer, token_ids), body)

    async def load_adapter(self, name: str, folder: str) -> None:
        await self._text("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def unload_adapter(self, name: str) -> None:
        await self._text("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    async def reload_weights(self, folder: str) -> None:
        """Have every worker take all weights from the checkpoint in `folder`. Only with `VLLM_SERVER_DEV_MODE=1`."""
        await self._text("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})

    async def world_size(self) -> int:
        """How many workers it has. This and the four phases of weight transfer: only with `VLLM_SERVER_DEV_MODE=1`."""
        return await self._json("GET", "/get_world_size", lambda answer: int(answer["world_size"]))

    async def init_weight_transfer_engine(self, where: Mapping[str, Any]) -> None:
        """Have every worker join the trainer's group."""
        await self._text("POST", "/init_weight_transfer_engine", {"init_info": dict(where)})

    async def start_weight_update(self) -> None:
        await self._text("POST", "/start_weight_update", {"is_checkpoint_format": True})

    async def update_weights(self, description: Mapping[str, Any]) -> None:
        """Have every worker take the tensors that are sent now."""
        await self._text("POST", "/update_weights", {"update_info": dict(description)})

    async def finish_weight_update(self) -> None:
        await self._text("POST", "/finish_weight_update")

    async def reset_prefix_cache(self) -> None:
        """Forget the keys of earlier weights. Only with `VLLM_SERVER_DEV_MODE=1`."""
        await self._text("POST", "/reset_prefix_cache")

    async def pause(self) -> None:
        """End every request, and begin none until `resume`. Only with `VLLM_SERVER_DEV_MODE=1`."""
        await self._text("POST", "/pause?mode=abort")

    async def resume(self) -> None:
        await self._text("POST", "/resume")

    async def _json(
        self, method: str, path: str, read: Callable[[Any], T], body: Mapping[str, Any] | None = None
    ) -> T:
        text = await self._text(method, path, body)
        try:
            return read(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RefusedError(200, f"{path} does not answer as vLLM's does: {_short(text)}") from error

    async def _text(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, limit_s: float | None = None
    ) -> str:
        timeout = aiohttp.ClientTimeout(total=limit_s or self._limit_s)
        try:
            async with self._session.request(method, f"{self.url}{path}", json=body, timeout=timeout) as response:
                text = await response.text()
                status = response.status
        except TimeoutError as error:
            raise UnreachableError(f"no answer to {path} within {timeout.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{type(error).__name__}: {error}") from error
        if status >= 500 and path != "/v1/load_lora_adapter":
            raise UnreachableError(f"HTTP {status}: {_reason(text)}")
        if status >= 400:
            raise RefusedError(status, _reason(text))
        return text


def new_session(api_key: str | None) -> aiohttp.ClientSession:
    """A session for all servers; to be made in their event loop, and closed there.

    The environment's proxies are not used: servers are named by their own address.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # A run has as many requests under way as its servers take; the engine bounds their number.
    return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), trust_env=False)


def _answer(answer: Any, prompt: Sequence[int]) -> TokenAnswer:
    (choice,) = answer["choices"]
    tokens = [] if choice["logprobs"] is None else choice["logprobs"]["content"]
    positions = answer.get("prompt_logprobs") or ()
    return TokenAnswer(
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(float(each["logprob"]) for each in tokens),
        finish_reason=str(choice["finish_reason"]),
        prompt_logprobs=tuple(
            None if position is None else float(position[str(token)]["logprob"])
            for token, position in zip(prompt, positions, strict=len(positions) > 0)
        ),
    )


def _reason(text: str) -> str:
    """vLLM's message out of an error's JSON, or the beginning of the text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (json.JSONDecodeError, KeyError, TypeError):
        return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
