"""Whether vLLM uses all of what it was given: what it leaves out it says in its log alone, or not at all."""

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import torch


def unserved_modules(llm: Any, adapter_id: int, adapted: Collection[str]) -> list[str]:
    """The modules of an adapter that vLLM holds and does not apply.

    vLLM compares no more than the last part of a module's name when it reads an adapter, and where it then finds
    nothing for a module of its own, the base alone answers.

    Args:
        llm: the engine.
        adapter_id: the adapter, which `llm` holds.
        adapted: the modules that the policy's adapter changes.

    Raises:
        RuntimeError: if this vLLM does not let us look.
    """
    try:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        manager = runner.lora_manager._adapter_manager
        held, modules, packed = manager.get_adapter(adapter_id).loras, manager.modules, manager.packed_modules
    except AttributeError as error:
        raise RuntimeError(
            f"It cannot be told which modules of the adapter this vLLM applies ({error}). Install vllm 0.23.0, or "
            "write `rollout_backend: hf`."
        ) from error
    served = set()
    for name in held.keys() & modules.keys():
        parts = packed.get(name, [name])  # vLLM packs q_proj, k_proj and v_proj into qkv_proj, None where one has none
        absent = {part for part, weight in zip(parts, held[name].lora_a, strict=False) if weight is None}
        served |= set(parts) - absent
    strangers = held.keys() - modules.keys()
    # Some models' modules have other names in vLLM, so that only the number can be compared.
    if strangers or not served or len(served) != len(adapted):
        return sorted(strangers or set(adapted) - served or served or {"all of them"})
    return []


def reload_weights(llm: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    """Hand whole weights to vLLM's own reload, and name what it did not take.

    Where a weight is missing vLLM puts the old one back, or leaves part of a fused one as it finds the memory.
    """
    report = _ReloadReport()
    with report.listening():
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    left = [name for name, _ in weights]
    if not report.heard:
        return ["no layer, as far as its log says"]
    # A rotary embedding has a buffer that no checkpoint holds, and a tied output layer no weight of its own.
    (with_weights,) = llm.apply_model(_layers_with_weights)
    lost = [f"a weight of a {layer}" for layer in dict.fromkeys(report.layers) if layer in with_weights]
    return [*left, *report.names, *lost]


def _layers_with_weights(model: torch.nn.Module) -> set[str]:
    owners = (name.rpartition(".")[0] for name, _ in model.named_parameters())
    return {type(model.get_submodule(owner)).__name__ for owner in owners}


class _ReloadReport(logging.Filter):
    """What vLLM logs of a reload; nothing of it is printed that would not be otherwise."""

    _LOGGERS = ("vllm.model_executor.model_loader.reload.layerwise", "vllm.v1.worker.gpu_model_runner")

    def __init__(self) -> None:
        super().__init__()
        self.heard = False
        self.layers: list[str] = []
        self.names: list[str] = []
        self._printed_from = logging.NOTSET

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        loggers = [logging.getLogger(name) for name in self._LOGGERS]
        levels = [logger.level for logger in loggers]
        self._printed_from = loggers[0].getEffectiveLevel()
        for logger in loggers:
            logger.addFilter(self)
            logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeFilter(self)
                logger.setLevel(level)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        layer, _, event = message.partition(": ")
        if event == "Processed":
            self.heard = True
        # One of a fused layer's weights is missing; embeddings are padded, and never whole.
        elif event == "Failed to load weights" or (event == "Delayed processing" and layer.endswith("Linear")):
            self.layers.append(layer)
        elif message.startswith("Following weights were not loaded"):
            self.names.append(message.partition(": ")[2])
        return record.levelno >= self._printed_from
