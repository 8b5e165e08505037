"""Rollouts with vLLM in the trainer's own process: one engine a rank, or a few ranks, brought to the policy by `sync`.

Where the policy is a base with a LoRA adapter, vLLM serves the adapter natively, a new one for each version. Where it
is a whole model, or the adapter is merged into its weights, vLLM's own reload takes all weights. An engine does one or
the other.
"""

import contextlib
import functools
import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grpo_stage.rollout.engines import vllm_delivery, vllm_process, vllm_together
from grpo_stage.rollout.engines.decoding import completion_text
from grpo_stage.rollout.engines.seeds import sample_seed
from grpo_stage.rollout.engines.vllm_options import rank_with_room
from grpo_stage.rollout.engines.vllm_requests import (
    SCORING,
    refuse_long_prompts,
    sampling_arguments,
    temperature_of_logprobs,
    with_logprobs,
)
from grpo_stage.rollout.engines.vllm_settings import VLLMSettings
from grpo_stage.rollout.engines.weights import PolicyWeights, Weights
from grpo_stage.types import Completion, FinishReason, ImageReader, Prompt, RolloutGroup, SamplingSettings


class VLLMEngine:
    """vLLM behind the `RolloutEngine` protocol, started by the constructor."""

    def __init__(
        self,
        settings: VLLMSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        images: ImageReader | None = None,
    ) -> None:
        """
        Args:
            settings: what it is started with.
            tokenizer: decodes completions; None leaves their texts empty.
            images: reads those of prompts; None in a run without.

        Raises:
            ValueError: for an option that would make rollouts wrong.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._images = images
        self.logprob_temperature = settings.logprob_temperature or math.nan
        self._is_asleep = False
        self._deliveries = 0
        self._versions: dict[int, int] = {}
        self._loaded_weights: int | None = None
        self._is_synced = False
        self._lora: Any = None
        self.on_step: Callable[[], None] = lambda: None

        owns_process_group = not torch.distributed.is_initialized()
        with vllm_process.process_unchanged(), _tokenizer_arguments(tokenizer, settings) as texts:
            self._llm: Any = vllm_process.start(_arguments(settings) | texts, settings.options)
        self._release = weakref.finalize(self, vllm_process.release, self._llm, owns_process_group)

    def sync(self, policy: torch.nn.Module, version: int) -> None:
        """Bring the engine to the policy: its adapter, or all of its weights, and an empty prefix cache.

        Raises:
            ValueError: if vLLM cannot serve the policy.
            RuntimeError: as `load` does.
        """
        self._is_synced = False
        self.load(PolicyWeights(policy, is_adapter=self._settings.adapter), version)

    def load(self, weights: Weights, version: int) -> None:
        """What `sync` does, with weights that may come from another process.

        Raises:
            RuntimeError: if the engine holds anything but what was delivered afterwards, or keys of an earlier one.
        """
        self._is_synced = False
        self._deliveries += 1
        self._versions = {self._deliveries: version}
        with vllm_process.random_states_unchanged():
            self._wake_up("weights")  # first alone: the cache's memory is free while the weights arrive
            if self._settings.adapter:
                self._deliver_adapter(weights)
            else:
                self._deliver_weights(weights)
            self._wake_up("kv_cache")
            self._is_asleep = False
            if self._settings.max_images:
                self._llm.llm_engine.reset_encoder_cache()  # what other weights have made of an image
            # Keys of other weights would answer for these, and a resumed run's engine has none.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError(
                    f"vLLM did not empty its prefix cache for version {version}: completions would be sampled from "
                    "keys of an earlier policy."
                )
        if self._loaded() != self._deliveries:
            raise RuntimeError(
                f"vLLM was given the weights of version {version} (delivery {self._deliveries}) and holds delivery "
                f"{self._loaded()}."
            )
        if self._settings.adapter and (
            lost := vllm_delivery.unserved_modules(self._llm, self._deliveries, weights.adapted)
        ):
            raise RuntimeError(
                f"vLLM holds the adapter of version {version} and does not apply it to {_few(lost)}: the model "
                "under the adapter would answer there. Write `rollout_backend: hf`, and please report the model."
            )
        self._is_synced = True

    def sleep(self) -> None:
        """Give up the GPU memory that `sleep_level` says, until the next `sync`."""
        if self._settings.sleep_level and not self._is_asleep:
            self._is_synced = False
            self._llm.sleep(level=self._settings.sleep_level)
            self._is_asleep = True

    def _wake_up(self, tag: str) -> None:
        if self._is_asleep:
            self._llm.wake_up(tags=[tag])

    def _deliver_adapter(self, weights: Weights) -> None:
        from vllm.lora.request import LoRARequest

        engine = self._llm.llm_engine
        for adapter_id in engine.list_loras():
            engine.remove_lora(adapter_id)
        # The files are read once, by add_lora, so nothing of them is left behind however the run ends.
        with weights.adapter() as folder:
            self._lora = LoRARequest(self._adapter_name(self._deliveries), self._deliveries, str(folder))
            engine.add_lora(self._lora)

    def _deliver_weights(self, weights: Weights) -> None:
        """Hand the weights to vLLM's own reload, which copies them."""
        self._loaded_weights = None
        if lost := vllm_delivery.reload_weights(self._llm, weights.tensors()):
            raise RuntimeError(
                f"vLLM did not take all weights of version {self._versions[self._deliveries]}: {_few(lost)}. "
                "Write `rollout_backend: hf`, and please report the model."
            )
        vllm_process.pack_tied_weights_on_cpu(self._llm)
        self._loaded_weights = self._deliveries

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingSettings, step: int) -> list[RolloutGroup]:
        if not self._is_synced:
            raise RuntimeError("generate() was called before sync(): there is no policy to sample from.")
        self.logprob_temperature = temperature_of_logprobs(self._settings.logprob_temperature, sampling)
        refuse_long_prompts(prompts, sampling, self._settings.max_model_len)
        group_size = sampling.num_generations
        outputs = self._ask(
            [request for prompt in prompts for request in [self._request(prompt)] * group_size],
            [
                _sampling_params(prompt, sampling, sample_seed(sampling.seed, step, prompt.index, sample))
                for prompt in prompts
                for sample in range(group_size)
            ],
        )
        groups = [
            self._group(prompt, outputs[i * group_size : (i + 1) * group_size], sampling)
            for i, prompt in enumerate(prompts)
        ]
        return groups if sampling.structured_outputs is None else with_logprobs(groups, self.score(groups))

    def score(self, groups: Sequence[RolloutGroup]) -> list[torch.Tensor]:
        if not self._is_synced:
            raise RuntimeError("score() was called before sync(): there is no policy to ask.")
        sequences = [(group.prompt, each.token_ids) for group in groups for each in group.completions]
        outputs = self._ask(
            [self._request(prompt, completion) for prompt, completion in sequences],
            [_scoring_params() for _ in sequences],
        )
        return [
            torch.tensor(
                [
                    position[token].logprob
                    for token, position in zip(
                        completion, output.prompt_logprobs[len(prompt.token_ids) :], strict=True
                    )
                ]
            )
            for (prompt, completion), output in zip(sequences, outputs, strict=True)
        ]

    def _ask(self, requests: Sequence[Any], params: Sequence[Any]) -> Sequence[Any]:
        """vLLM's answers to this rank's requests."""
        generate = functools.partial(self._llm.generate, lora_request=self._lora, use_tqdm=False)
        with vllm_process.random_states_unchanged(), vllm_process.eager_on_cpu(), self._calls_on_step():
            if self._settings.tensor_parallel_size > 1:
                return vllm_together.ask(generate, requests, params)
            return generate(requests, params)

    def _request(self, prompt: Prompt, completion: tuple[int, ...] = ()) -> dict[str, Any]:
        """A prompt and what follows it. Of an image vLLM gets one token: it puts in the others, and compares nothing,
        so that what it has made of the prompt is compared with the prompt once it has answered."""
        if not prompt.images:
            return {"prompt_token_ids": [*prompt.token_ids, *completion]}
        assert self._images is not None
        token_ids, images = self._images.compact(prompt)
        return {"prompt_token_ids": [*token_ids, *completion], "multi_modal_data": {"image": images}}

    def close(self) -> None:
        self._is_synced = False
        self._lora = None
        self._llm = None
        self._release()

    @contextlib.contextmanager
    def _calls_on_step(self) -> Iterator[None]:
        """Call `on_step` before each of vLLM's steps, and leave no request behind where that or a step raises."""
        engine = self._llm.llm_engine
        step, is_shared = engine.step, self._settings.tensor_parallel_size > 1

        def checked_step() -> Any:
            if is_shared:
                vllm_together.check(self.on_step)
            else:
                self.on_step()
            return step()

        engine.step = checked_step
        try:
            yield
        except BaseException:
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        finally:
            del engine.step

    def _adapter_name(self, adapter_id: int) -> str:
        """Never one that was used before: vLLM's prefix cache is keyed by the name, and would answer from old keys."""
        return f"policy-{adapter_id}"

    def _loaded(self) -> int | None:
        """The delivery that the engine holds, of adapters by its own word; None where it is not exactly one."""
        if not self._settings.adapter:
            return self._loaded_weights
        loaded = self._llm.llm_engine.list_loras()
        return next(iter(loaded)) if len(loaded) == 1 else None

    def _group(self, prompt: Prompt, outputs: Sequence[Any], sampling: SamplingSettings) -> RolloutGroup:
        loaded = self._loaded()
        answered = {output.lora_request.lora_int_id if output.lora_request else None for output in outputs}
        if loaded not in self._versions or answered != ({loaded} if self._settings.adapter else {None}):
            raise RuntimeError(
                f"Prompt {prompt.index} was answered by the adapter ids {answered} and vLLM holds {loaded}: the "
                "completions cannot be said to come from one policy."
            )
        if len(outputs) != sampling.num_generations or any(
            tuple(output.prompt_token_ids) != prompt.token_ids for output in outputs
        ):
            raise RuntimeError(f"vLLM's answers to prompt {prompt.index} are not answers to that prompt.")
        return RolloutGroup(
            prompt=prompt,
            completions=tuple(self._completion(output.outputs[0]) for output in outputs),
            policy_version=self._versions[loaded],
        )

    def _completion(self, output: Any) -> Completion:
        token_ids, finish_reason = tuple(output.token_ids), FinishReason(output.finish_reason)
        return Completion(
            token_ids=token_ids,
            sampling_logprobs=tuple(
                position[token].logprob for token, position in zip(token_ids, output.logprobs, strict=True)
            ),
            finish_reason=finish_reason,
            text="" if self._tokenizer is None else completion_text(self._tokenizer, token_ids, finish_reason),
        )


@contextlib.contextmanager
def _tokenizer_arguments(
    tokenizer: PreTrainedTokenizerBase | None, settings: VLLMSettings
) -> Iterator[dict[str, Any]]:
    """Those by which vLLM knows the text of each token and the one that ends a completion, or that it need not."""
    if not settings.reads_text and not settings.max_images:
        yield {"skip_tokenizer_init": True}
        return
    assert tokenizer is not None
    with tempfile.TemporaryDirectory(prefix="grpo-stage-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield {"skip_tokenizer_init": False, "tokenizer": folder}


def _arguments(settings: VLLMSettings) -> dict[str, Any]:
    """Those of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": settings.model_name_or_path,
        "revision": settings.model_revision,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "quantization": settings.quantization,
        "enable_sleep_mode": settings.sleep_level > 0,
        "logprobs_mode": "processed_logprobs" if settings.logprob_temperature is None else "raw_logprobs",
        "enable_prefix_caching": True,  # the completions of a group share their prompt
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager,
        "trust_remote_code": settings.trust_remote_code,
        "hf_token": settings.hf_token,
        "download_dir": settings.download_dir,
        "seed": settings.seed,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        # On a GPU only this executor puts each rank's engine on the rank's own device.
        "distributed_executor_backend": "external_launcher" if vllm_process.num_ranks() > 1 else "uni",
    }
    if settings.tensor_parallel_size > 1:
        arguments |= {
            "tensor_parallel_size": settings.tensor_parallel_size,
            "cpu_distributed_timeout_seconds": settings.timeout_s,
        }
    if settings.max_images:
        arguments |= {"limit_mm_per_prompt": {"image": settings.max_images, "video": 0, "audio": 0}}
    if settings.adapter:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_cpu_loras": 1,
            "max_lora_rank": rank_with_room(settings.max_lora_rank),
        }
    return arguments


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sampling_params(prompt: Prompt, sampling: SamplingSettings, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    arguments = sampling_arguments(prompt, sampling, seed)
    if (structured := arguments["structured_outputs"]) is not None:
        arguments["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(**arguments)


def _scoring_params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(**SCORING)
