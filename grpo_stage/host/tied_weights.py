"""An adapter on a weight that two layers share, as the embedding and the output layer of most small models do.

During training, LoRA acts on its own layer alone. If the host's export merges it into the shared weight, it acts on
both layers: the merged model is another policy than the trained one. A layer that is trained whole beside LoRA
(`additional_target`) has its own weight from the start, and merges correctly.
"""

from collections import defaultdict
from collections.abc import Iterable

from peft import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig


def refuse_planned(adapter: PeftConfig, config: PretrainedConfig, source: str) -> None:
    """Refuse an adapter by its config, before its model is loaded.

    Args:
        adapter: the adapter's config.
        config: the config of the model that the adapter stands on.
        source: the key and value that name the adapter, for the message.

    Raises:
        ValueError: if the adapter changes a weight that two layers share, as far as transformers shows it.
    """
    tied = _tied_layers(config)
    saved = tuple(getattr(adapter, "modules_to_save", None) or ())
    if not any(name.endswith(saved) for name in tied):
        _refuse([name for name in tied if check_target_module_exists(adapter, name)], tied, source)


def refuse_built(model: nn.Module, source: str) -> None:
    """Refuse the adapter of a loaded model, whose layers can be compared.

    Raises:
        ValueError: if the adapter changes a weight that two layers share.
    """
    for layers in _layers_that_share(model):
        if not _trained_whole(layers):
            adapted = [name for name, layer in layers.items() if _is_adapted(layer)]
            _refuse(adapted, layers, source)


def layers_parted(model: nn.Module) -> list[str]:
    """Names of the layers that share a weight in the model's files but not in training: one or both train whole."""
    return [name for layers in _layers_that_share(model) if _trained_whole(layers) for name in layers]


def _tied_layers(config: PretrainedConfig) -> list[str]:
    if not getattr(config, "tie_word_embeddings", False):
        return []
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    keys = getattr(model_class, "_tied_weights_keys", None) or {}
    sources = keys.values() if isinstance(keys, dict) else ()  # in transformers 4 it lists the output layer alone
    return [key.removesuffix(".weight") for key in (*keys, *sources)]


def _layers_that_share(model: nn.Module) -> list[dict[str, nn.Module]]:
    """For each weight that several layers share, these layers; if PEFT wraps a layer, the wrapper."""
    layers: defaultdict[int, dict[str, nn.Module]] = defaultdict(dict)
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        name = parent if last in ("base_layer", "original_module") else path
        if "weight" in module._parameters and ".modules_to_save." not in path:
            layers[id(module.weight)][name] = model.get_submodule(name)
    return [sharing for sharing in layers.values() if len(sharing) > 1]


def _trained_whole(layers: dict[str, nn.Module]) -> bool:
    return any(isinstance(layer, ModulesToSaveWrapper) for layer in layers.values())


def _is_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer)  # PEFT ties these itself


def _refuse(adapted: Iterable[str], tied: Iterable[str], source: str) -> None:
    own, both = (sorted({name.rpartition(".")[2] for name in names}) for names in (adapted, tied))
    if own:
        raise ValueError(
            f"{source} is not possible: it adapts {' and '.join(f'`{name}`' for name in own)}, and the layers "
            f"{' and '.join(f'`{name}`' for name in both)} of this model share one weight (`tie_word_embeddings`). "
            "Merged into it, as by `llamafactory-cli export`, the adapter would change both layers, and the model "
            f"would be another policy than the one trained. Leave {' and '.join(f'`{name}`' for name in own)} out of "
            f"`lora_target`, or train the layers whole: `additional_target: {','.join(both)}` with `rollout_backend: "
            "hf`, since vLLM serves no such layers."
        )
