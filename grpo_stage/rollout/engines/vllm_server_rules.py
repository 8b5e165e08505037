"""What a run with `rollout_backend: vllm_server` is refused for before any server is asked. Imports nothing heavy."""

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from grpo_stage.algorithm.conditions import Rule, refuse_broken
from grpo_stage.rollout.engines.lora import asks_for_new_tokens
from grpo_stage.rollout.engines.vllm_options import refuse_options
from grpo_stage.rollout.engines.vllm_rules import POSITION_RULES, SHARED_RULES, refuse_unreadable_form, vllm_rule
from grpo_stage.types import SamplingSettings


_OWN_VLLM = "write `rollout_backend: vllm`, which starts vLLM from the trainer's own model"
_SAVE_FIRST = f"Save that model first (`llamafactory-cli export`) and train it, or {_OWN_VLLM}"
_FILES = "the servers hold the model as its files have it, and the trainer would hold another under the adapter"
_PORTS = {"http": 80, "https": 443}


def urls_of(text: str) -> list[str]:
    """The addresses in `vllm_server_urls`, each without a path."""
    return [url.strip().rstrip("/") for url in text.split(",") if url.strip()]


def serves_adapter(v: SimpleNamespace) -> bool:
    """Whether the policy reaches vLLM as an adapter; otherwise as whole weights."""
    return bool(v.finetuning_type == "lora" and v.vllm_lora == "native")


def logprobs_mode(v: SimpleNamespace) -> str:
    """What `--logprobs-mode` has to be: log-probabilities of the sampled distribution where that is the policy's own
    at some temperature, and otherwise those of the policy at temperature 1."""
    sampling = SamplingSettings(
        num_generations=v.num_generations,
        max_new_tokens=v.max_new_tokens,
        temperature=v.temperature,
        top_p=v.top_p,
        top_k=max(v.top_k, 0),
        min_p=v.min_p,
        structured_outputs=v.structured_outputs,
        repetition_penalty=v.repetition_penalty,
    )
    return "processed_logprobs" if sampling.is_neutral else "raw_logprobs"


def _broken_urls(v: SimpleNamespace) -> list[str]:
    return [url for url in urls_of(v.vllm_server_urls or "") if _address(url) is None]


def _address(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for anything that is no server's address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname or any(character.isspace() for character in url):
        return None
    if parts.path or parts.query or parts.fragment:
        return None
    return parts.scheme, parts.hostname, _PORTS[parts.scheme] if port is None else port


def _repeated_urls(v: SimpleNamespace) -> list[str]:
    seen: dict[Any, str] = {}
    return [url for url in urls_of(v.vllm_server_urls or "") if seen.setdefault(_address(url), url) is not url]


def _names_of(value: Any) -> Sequence[str]:
    """The words of a comma-separated text or a list."""
    words = value.split(",") if isinstance(value, str) else list(value or ())
    return [word.strip() for word in words if word.strip()]


def _trains_on(v: SimpleNamespace) -> bool:
    """Whether adapters are merged into the model before training."""
    adapters = _names_of(v.adapter_name_or_path)
    return len(adapters) > 1 or bool(adapters and v.create_new_adapter)


SERVER_RULES = (
    Rule(
        lambda v: not urls_of(v.vllm_server_urls or ""),
        "`rollout_backend: vllm_server` needs `vllm_server_urls`, the addresses of the servers that sample. Write for "
        "example `vllm_server_urls: http://localhost:8000`; `grpo-stage serve` prints the command that starts one.",
    ),
    Rule(
        lambda v: "@" in (v.vllm_server_urls or ""),
        "`vllm_server_urls` has a name or a password in an address, where logs and messages would show it. Leave it "
        "out; a key for the servers goes into the environment (VLLM_API_KEY).",
    ),
    Rule(
        lambda v: bool(_broken_urls(v)),
        lambda v: (
            f"`vllm_server_urls: {v.vllm_server_urls}` has `{_broken_urls(v)[0]}`, which is no server's address: "
            "that is `http://` or `https://`, a host and a port, without a path. Write for example "
            "`http://localhost:8000,http://otherhost:8000`."
        ),
    ),
    Rule(
        lambda v: bool(_repeated_urls(v)),
        lambda v: (
            f"`vllm_server_urls: {v.vllm_server_urls}` names `{_repeated_urls(v)[0]}` twice: it would get twice the "
            "requests and each adapter twice. Name each server once."
        ),
    ),
    vllm_rule(
        lambda v: v.quantization_bit is not None,
        "`quantization_bit: {quantization_bit}` is not possible",
        _FILES,
        f"Leave it out, or {_OWN_VLLM}",
    ),
    vllm_rule(
        lambda v: asks_for_new_tokens(v),
        "`resize_vocab`, `add_tokens`, `add_special_tokens` and `new_special_tokens_config` are not possible",
        "the servers hold the model as its files have it, with the vocabulary that these have",
        _SAVE_FIRST,
    ),
    vllm_rule(
        lambda v: serves_adapter(v) and _trains_on(v),
        "`adapter_name_or_path: {adapter_name_or_path}` is not possible where the trainer merges it",
        _FILES,
        _SAVE_FIRST,
    ),
    vllm_rule(
        lambda v: serves_adapter(v) and v.pissa_init,
        "`pissa_init: true` is not possible",
        "it takes the adapter's first value off the model's weights, and the servers have these as the files do",
        f"Leave it out, or {_OWN_VLLM}",
    ),
    vllm_rule(
        lambda v: serves_adapter(v) and v.train_from_scratch,
        "`train_from_scratch: true` is not possible",
        _FILES,
        "Write `finetuning_type: full`, which delivers all weights",
    ),
    vllm_rule(
        lambda v: serves_adapter(v) and "lm_head" in _names_of(v.lora_target),
        "`lora_target: {lora_target}` is not possible",
        "vLLM leaves an adapter of the output layer (`lm_head`) out where it scores tokens, so that nothing could "
        "tell whether its servers follow the policy",
        f"Leave `lm_head` out, or {_OWN_VLLM}",
    ),
    vllm_rule(
        lambda v: v.vllm_server_transfer == "nccl" and serves_adapter(v),
        "`vllm_server_transfer: nccl` is not possible with `vllm_lora: native`",
        "an adapter of a few megabytes is delivered, as files, so that it would have no effect",
        "Leave it out, or write `vllm_lora: merged`, which delivers all weights",
    ),
    *SHARED_RULES,
)

_MODEL_RULES = (
    vllm_rule(
        lambda v: v.model_quantization is not None,
        "`model_name_or_path: {model_name_or_path}`, which is quantized with {model_quantization}, is not possible",
        "what the servers make of such files was not compared with what the trainer does",
        f"Train the unquantized model, or {_OWN_VLLM}",
    ),
    vllm_rule(
        lambda v: v.is_tied and v.device_type == "cpu" and not serves_adapter(v),
        "Delivering all weights of `model_name_or_path: {model_name_or_path}` is not possible on a CPU",
        "its output layer shares the embeddings' weight, of which vLLM keeps a packed copy there that its reload "
        "leaves as it was, and a server cannot be made to pack it anew",
        f"Write `finetuning_type: lora` with `vllm_lora: native`, or {_OWN_VLLM}",
    ),
    vllm_rule(
        lambda v: v.vllm_server_transfer == "nccl" and v.device_type != "cuda",
        "`vllm_server_transfer: nccl` is not possible",
        "the trainer computes on `{device_type}` here, and NCCL sends from one GPU to another",
        "Write `vllm_server_transfer: files`",
    ),
    vllm_rule(
        lambda v: v.vllm_server_transfer == "nccl" and find_spec("vllm") is None,
        "`vllm_server_transfer: nccl` is not possible",
        "the trainer sends with vLLM's own communicator, and vLLM is not installed beside it",
        'Install it with `pip install "grpo-stage[vllm]"`, or write `vllm_server_transfer: files`',
    ),
    *POSITION_RULES,
)


def refuse_unfit(v: SimpleNamespace) -> None:
    """Refuse what takes the parsed keys and the model's config to tell; see `EngineEntry.refuse_unfit`."""
    has_vllm = find_spec("vllm") is not None  # it need not be installed beside the trainer
    if v.vllm_config and has_vllm:
        refuse_options(v.vllm_config, on_cpu=v.device_type == "cpu", is_server=True)
    if v.structured_outputs and has_vllm:
        refuse_unreadable_form(v.structured_outputs)
    refuse_broken(_MODEL_RULES, v)
