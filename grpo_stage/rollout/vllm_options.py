"""Which of vLLM's own options a run may set (`vllm_config`), told without importing vLLM."""

import ast
import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for `max_lora_rank`."""

OWNED_OPTIONS = {
    "model": "`model_name_or_path` names the model that is trained",
    "revision": "`model_revision` names the one that is trained",
    "dtype": "it follows the trained model and the device",
    "max_model_len": "`vllm_maxlen` sets it",
    "seed": "each completion has its own seed",
    "skip_tokenizer_init": "token ids go in and out",
    "logprobs_mode": "the log-probabilities are compared with the trainer's",
    "logits_processors": "they would change the distribution that completions are drawn from",
    "quantization": "`vllm_base` says how vLLM holds the model",
    "load_format": "the weights are those of the model that is trained",
    "enable_sleep_mode": "`vllm_sleep` sets it",
    "enable_lora": "the tuning method decides how the policy reaches vLLM",
    "max_loras": "exactly one adapter may be loaded",
    "max_cpu_loras": "exactly one adapter may be loaded",
    "max_lora_rank": "`vllm_max_lora_rank` sets it",
    "tensor_parallel_size": "each rank is an engine of its own",
    "pipeline_parallel_size": "each rank is an engine of its own",
    "data_parallel_size": "each rank is an engine of its own",
    "distributed_executor_backend": "the engine lives in the trainer's process",
}
"""`vllm_config` keys that would make rollouts wrong, and why."""

OWNED_OPTIONS_ON_CPU = {"enable_chunked_prefill": "vLLM's seeds fail with it on a CPU"}


def refuse_options(options: Iterable[str], on_cpu: bool) -> None:
    """Refuse what would make rollouts wrong, and what vLLM does not know.

    Raises:
        ValueError: naming the option, the reason and the remedy.
    """
    owned = OWNED_OPTIONS | (OWNED_OPTIONS_ON_CPU if on_cpu else {})
    known = known_options()
    for key in options:
        if key in owned:
            raise ValueError(f"`{key}` cannot be set in `vllm_config`: {owned[key]}. Leave it out.")
        if key not in known:
            near = difflib.get_close_matches(key, known - owned.keys(), n=1)
            raise ValueError(
                f"`{key}` cannot be set in `vllm_config`: the installed vLLM has no such argument. "
                f"{f'Did you mean `{near[0]}`?' if near else 'Leave it out.'}"
            )


def known_options() -> set[str]:
    """The arguments of vLLM's engine, out of its source: importing it takes ten seconds and changes the process."""
    spec = find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.submodule_search_locations is not None
    (package,) = spec.submodule_search_locations
    source = Path(package, "engine", "arg_utils.py").read_text(encoding="utf-8")
    arguments = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"
    )
    return {
        node.target.id
        for node in arguments.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
