"""The model that is trained, as the host loads it."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from grpo_stage.host import facade
from grpo_stage.host.distribution import is_sharded
from grpo_stage.host.model_checks import adapter_source
from grpo_stage.host.precision import compute_as_asked, warn_of_slow_precision
from grpo_stage.host.run_arguments import RunArguments
from grpo_stage.host.tied_weights import layers_parted, refuse_built


logger = facade.get_logger(__name__)


def load_policy(arguments: RunArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, on the device where it is trained, so that copies of it are there as well.

    Raises:
        ValueError: if its adapter changes a weight that two layers share.
    """
    finetuning_args, do_train = arguments.finetuning, arguments.training.do_train
    model = to_device(facade.load_model(tokenizer, arguments.model, finetuning_args, do_train), arguments)
    refuse_built(model, adapter_source(arguments))
    _leave_routers_to_us(model.config)
    _warn_of_parted_layers(model)
    warn_of_slow_precision(model)
    return model


def to_device(model: Any, arguments: RunArguments) -> Any:
    """Move the model to its device: the host does so only with `low_cpu_mem_usage` or quantization, Trainer later.

    One that is to be sharded stays where it is: whole it may not fit.
    """
    if getattr(model, "quantization_method", None) is not None:
        compute_as_asked(model)
        return model
    return model if is_sharded(arguments.training.deepspeed) else model.to(arguments.training.device)


def _leave_routers_to_us(config: Any) -> None:
    """Keep transformers from a loss on the routers of its own.

    Nobody would read it, and with the cache of generate it fails. The host asks for it with `moe_aux_loss_coef`, and
    so do the configs of models that it has trained with that.
    """
    for part in (config, config.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False


def _warn_of_parted_layers(model: Any) -> None:
    """Warn of tied layers that training separates: the host's export keeps `tie_word_embeddings` in their config."""
    if layers := layers_parted(model):
        logger.warning_rank0(
            f"{' and '.join(layers)} share one weight in the model's files, and here each is trained with its own. "
            "transformers 5 reads such a model as it is once it is exported, but vLLM and transformers 4 read one "
            'weight for both, which is another policy: write `"tie_word_embeddings": false` into the config.json of '
            "the exported model."
        )
