"""`grpo-stage doctor x.yaml`: what the recipe's run needs of the disk, the memory, the model and its template."""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_stage.tools.finding import FAIL, OK, WARN, Finding
from grpo_stage.tools.recipe_file import errors_explained, parse_without_run


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from grpo_stage.host.run_arguments import RunArguments


GIB = 2**30
_ADAM_BYTES = 8
"""Two float32 moments for each trained parameter."""


def checks(recipe: Mapping[str, Any]) -> list[tuple[str, Callable[[], list[Finding]]]]:
    @cache
    def arguments() -> "RunArguments":
        with errors_explained(recipe):
            return parse_without_run(recipe, on_device=False)

    return [
        ("recipe", lambda: check_recipe(arguments)),
        ("output folder", partial(check_output, recipe)),
        ("disk and memory", lambda: check_room(arguments(), recipe)),
        ("template", lambda: check_template(arguments())),
    ]


def check_recipe(arguments: Callable[[], "RunArguments"]) -> list[Finding]:
    try:
        arguments()
    except ValueError as error:
        return [Finding(check="recipe", level=FAIL, said=" ".join(str(error).split()))]
    return [
        Finding(check="recipe", level=OK, said="its keys are accepted; `grpo-stage check` looks at its data as well")
    ]


def check_output(recipe: Mapping[str, Any]) -> list[Finding]:
    from grpo_stage.host.output_folder import check_output_folder

    folder = recipe.get("output_dir")
    if not folder:
        said = "the recipe names no `output_dir`"
        return [Finding(check="output folder", level=WARN, said=said, remedy="Write `output_dir: saves/my-run`.")]
    try:
        check_output_folder(str(folder))
    except ValueError as error:
        return [Finding(check="output folder", level=FAIL, said=str(error))]
    return [Finding(check="output folder", level=OK, said=f"{folder} can be written to")]


def check_room(arguments: "RunArguments", recipe: Mapping[str, Any]) -> list[Finding]:
    """What a run writes against the free disk, and the weights against the free memory."""
    import psutil
    import torch

    from grpo_stage.host.facade import load_config
    from grpo_stage.host.model_files import skeleton

    model = skeleton(load_config(arguments.model))
    if model is None:
        return [Finding(check="disk and memory", level=WARN, said="the model's size is not known from its config")]
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    finetuning, training = arguments.finetuning, arguments.training
    is_whole = finetuning.finetuning_type in ("full", "freeze")
    num_trained = num_parameters if is_whole else lora_parameters(model, finetuning.lora_rank, finetuning.lora_target)
    on_gpu = torch.cuda.is_available() and not recipe.get("use_cpu")
    bytes_each = 2 if on_gpu and (recipe.get("bf16") or recipe.get("fp16")) else 4
    saved = num_trained * (bytes_each if is_whole else 4)
    num_checkpoints = 0
    if str(getattr(training.save_strategy, "value", training.save_strategy)) != "no":
        # Without `max_steps` the number of steps takes the data to tell: two at the least are on the disk together.
        num_checkpoints = training.save_total_limit or (
            training.max_steps // int(training.save_steps or 1) if training.max_steps > 0 else 2
        )
    written = saved + num_checkpoints * (saved + num_trained * _ADAM_BYTES)
    output = Path(str(recipe.get("output_dir", "."))).absolute()
    nearest = next(folder for folder in (output, *output.parents) if folder.exists())
    # The engine holds weights of its own, in float32 on a CPU.
    copies = 1 + (1 / finetuning.vllm_tensor_parallel if str(finetuning.rollout_backend) == "vllm" else 0)
    needed = num_parameters * bytes_each * copies + num_trained * (_ADAM_BYTES + 4)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    return [
        judge_room(
            "disk",
            written,
            shutil.disk_usage(nearest).free,
            f"a run writes about ({num_checkpoints} checkpoints and the result)",
            "Save less often (`save_steps`), keep fewer (`save_total_limit: 2`), or name another `output_dir`.",
        ),
        judge_room(
            "device memory" if on_gpu else "main memory",
            needed,
            free,
            f"weights ({copies:.3g} x), gradients and optimizer take about",
            "Write `finetuning_type: lora`, train a smaller or quantized model, or free memory; `grpo-stage plan` has "
            "the whole account, activations included.",
        ),
    ]


def lora_parameters(model: Any, rank: int, targets: Collection[str]) -> int:
    """What LoRA of this rank adds to a model's linear layers of these names; `all` is all but the output layer."""
    from torch import nn

    total = 0
    for name, layer in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and (last in targets or ("all" in targets and last != "lm_head")):
            total += rank * (layer.in_features + layer.out_features)
    return total


def judge_room(check: str, needed: float, free: float, words: str, remedy: str) -> Finding:
    """Fail where what is needed is not free; warn where it takes more than 80 % of it."""
    said = f"{words} {needed / GIB:.2f} GiB, and {free / GIB:.1f} GiB are free"
    level = FAIL if needed > free else WARN if needed > 0.8 * free else OK
    return Finding(check=check, level=level, said=said, remedy="" if level == OK else remedy)


def check_template(arguments: "RunArguments") -> list[Finding]:
    """Whether template, tokenizer and generation config agree on where an answer ends, and on the prompt's form."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    from grpo_stage.host import facade
    from grpo_stage.host.sampling import stop_token_ids

    model_args, name = arguments.model, arguments.data.template
    original = facade.load_tokenizer(model_args)["tokenizer"]
    own_template, own_eos = original.chat_template, original.eos_token_id
    tokenizer = facade.load_tokenizer(model_args)["tokenizer"]
    template = facade.get_template_and_fix_tokenizer(tokenizer, arguments.data)
    config = facade.load_config(model_args)
    try:
        generation = GenerationConfig.from_pretrained(model_args.model_name_or_path)
    except OSError:  # a model without a generation_config.json
        generation = GenerationConfig.from_model_config(config)
    ends = stop_token_ids(SimpleNamespace(generation_config=generation), template, tokenizer)
    size = getattr(config.get_text_config(), "vocab_size", None)
    configured = generation.eos_token_id
    eos_ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    closing = facade.closing_tokens(template, tokenizer)
    return [
        *judge_ends(name, tokenizer, ends, closing, template.stop_words, eos_ids, own_eos, size),
        judge_form(name, own_template is not None, *_prompts(original, own_template, template, tokenizer)),
    ]


def judge_ends(
    template: str,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int],
    closing: Sequence[int],
    stop_words: Sequence[str],
    eos_ids: Sequence[int],
    own_eos: int | None,
    vocab_size: int | None,
) -> list[Finding]:
    """Whether every token that should end a completion exists and does.

    Args:
        template: its name.
        tokenizer: the tokenizer, changed by the template.
        ends: the tokens that end a completion in a run.
        closing: the tokens that the template puts after an answer.
        stop_words: the template's own.
        eos_ids: the generation config's.
        own_eos: the tokenizer's before the template changed it.
        vocab_size: how many embeddings the model has.
    """

    def shown(ids: Sequence[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(one)!r} ({one})" for one in ids) or "none"

    def say(level: str, said: str, remedy: str = "") -> Finding:
        return Finding(check="end of an answer", level=level, said=said, remedy=remedy)

    findings = []
    other_template = "Name the template that the model was trained with."
    for word in stop_words:
        token_id = tokenizer.convert_tokens_to_ids(word)
        if token_id is None or (token_id == tokenizer.unk_token_id and word != tokenizer.unk_token):
            said = f"`template: {template}` ends an answer with {word!r}, which the tokenizer does not have"
            findings.append(say(FAIL, said, other_template))
    if vocab_size is not None and (beyond := [one for one in ends if one >= vocab_size]):
        said = f"{shown(beyond)} of `template: {template}` has no embedding: the model has {vocab_size}"
        findings.append(say(FAIL, said, f"Write `resize_vocab: true`. {other_template}"))
    if closing and not any(one in ends for one in closing):
        findings.append(
            say(
                FAIL,
                f"`template: {template}` closes an answer with {shown(closing)}, and a completion ends at "
                f"{shown(ends)}: a model that was trained with it runs on to `max_new_tokens`",
                f"Add the token to `eos_token_id` in the model's generation_config.json. {other_template}",
            )
        )
    if eos_ids and own_eos is not None and own_eos not in eos_ids:
        findings.append(
            say(
                WARN,
                f"the tokenizer's end token {shown([own_eos])} is none of the generation config's, {shown(eos_ids)}: "
                "both end a completion here, and other programs may take one",
                "Make `eos_token` in tokenizer_config.json and `eos_token_id` in generation_config.json agree.",
            )
        )
    if not ends:
        findings.append(say(FAIL, "no token ends a completion", "Write `eos_token_id` into generation_config.json."))
    return findings or [say(OK, f"a completion ends at {shown(ends)}; `template: {template}` closes with one of them")]


def judge_form(template: str, has_chat_template: bool, ours: str, own: str) -> Finding:
    """Whether the model's own chat template makes the same prompt.

    Args:
        template: the name of the recipe's.
        has_chat_template: whether the tokenizer came with one: a base model often has none.
        ours: a sample prompt of the recipe's template, system prompt included.
        own: that of the model's chat template; empty without one.
    """
    if not has_chat_template:
        if template in ("default", "empty"):
            return Finding(check="template", level=OK, said=f"a base model with `template: {template}`")
        return Finding(
            check="template",
            level=WARN,
            said=f"the tokenizer has no chat template, so that this may be a base model, whose tokens of `template: "
            f"{template}` are not trained",
            remedy="For a base model write `template: default`, or teach it the template by `stage: sft` first.",
        )
    if ours.strip() == own.strip():
        return Finding(
            check="template",
            level=OK,
            said=f"`template: {template}` makes the prompt of the model's own chat template",
        )
    return Finding(
        check="template",
        level=WARN,
        said=f"`template: {template}` makes {ours!r:.300}, and the model's own chat template {own!r:.300}",
        remedy="Name the template that the model was trained with; `template` names those of LLaMA-Factory.",
    )


def _prompts(
    original: "PreTrainedTokenizerBase", own_template: Any, template: Any, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str]:
    """A sample prompt as the recipe's template makes it, and as the model's own does, with one system prompt."""
    from jinja2 import TemplateError

    user, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": ""}

    def ours(system: str | None) -> str:
        token_ids, _ = template.encode_oneturn(tokenizer, [user, answer], system=system)
        return str(tokenizer.decode(token_ids, skip_special_tokens=False))

    if own_template is None:
        return ours(None), ""
    render = partial(original.apply_chat_template, tokenize=False, add_generation_prompt=True)
    try:
        system = "Be kind."
        return ours(system), str(render([{"role": "system", "content": system}, user]))
    except TemplateError:  # a model that knows no system prompt
        return ours(None), str(render([user]))
