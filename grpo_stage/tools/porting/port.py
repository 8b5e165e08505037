"""A recipe of another system on its way to ours: what became of each of its keys, and why."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

from grpo_stage.algorithm.catalog import ESTIMATORS, LOSS_TYPES, TERMS
from grpo_stage.algorithm.combinations import ONLY_WITH
from grpo_stage.algorithm.conditions import applies
from grpo_stage.host.evaluation_rules import EVALUATION_RULES, check_best_metric
from grpo_stage.host.keys import TRL_KEYS
from grpo_stage.host.parser import effective_defaults, typed
from grpo_stage.host.rules import is_neutral
from grpo_stage.host.unsupported import UNSUPPORTED


class Fate(StrEnum):
    """What became of a key."""

    TAKEN = "taken"
    RENAMED = "renamed"
    COMPUTED = "computed"
    DEFAULT = "default"
    """The key is not in the file, and the other system's default is not ours: it is written down."""
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the account."""

    key: str
    """As the file has it; dotted where it is nested."""
    value: Any
    fate: Fate
    ours: Mapping[str, Any] = field(default_factory=dict)
    """The keys of ours that come of it."""
    note: str = ""
    """The reason, and how the meaning differs."""
    changes_learning: bool = False
    """What is trained differs from what the file says: a person has to look at it."""

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fate": self.fate.value, "ours": dict(self.ours)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a system's table: what becomes of a key whose value is taken by itself."""

    ours: str | None = None
    """The key of ours; None if it is left."""
    convert: Callable[[Any], Any] = lambda value: value
    note: str = ""
    changes_learning: bool = False


# Keys of several systems that decide where a run writes, what it logs, how fast it is and how much memory it takes.
WITHOUT_EFFECT = frozenset(
    [
        "hub_strategy",
        "hub_model_id",
        "hub_model_revision",
        "hub_token",
        "push_to_hub",
        "push_to_hub_revision",
        "overwrite_hub_revision",
        "callbacks",
        "benchmarks",
        "num_completions_to_print",
        "wandb_entity",
        "wandb_project",
        "wandb_run_group",
        "wandb_log_unique_prompts",
        "log_unique_prompts",
        "run_name",
        "project",
        "trackio_space_id",
        "num_processes",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "accelerator_config",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "bf16_full_eval",
        "fp16_full_eval",
        "dataset_num_proc",
        "dataset_streaming",
        "use_liger_kernel",
        "use_liger_loss",
        "vllm_device",
        "vllm_dtype",
        "vllm_mode",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_base_url",
        "vllm_server_timeout",
        "vllm_tensor_parallel_size",
        "vllm_enable_prefix_caching",
        "vllm_max_num_seqs",
        "vllm_model_impl",
        "vllm_group_port",
        "ds3_gather_for_generation",
        "cache_implementation",
        "use_transformers_paged",
        "torch_empty_cache_steps",
        "model_code_revision",
        "disable_dropout",
        "logging_first_step",
        "log_level",
        "data_seed",
        "dataloader_drop_last",
    ]
)


_COMPARISONS = ("rollout_correction", "rollout_rejection", "off_policy_mask_threshold")
_OTHER_DISTRIBUTION = (
    "it compares probabilities of the trainer and of the engine, and with `top_p`, `top_k`, `min_p` or "
    "`repetition_penalty` the engine samples from another distribution"
)
_BEST = (
    "the best model here is by a reward (`metric_for_best_model: eval_reward`), among evaluations that each have a "
    "checkpoint (`eval_steps` and `save_steps` are equal)"
)
FILES = {
    "deepspeed": "a config of the other system's: name the host's, such as `examples/deepspeed/ds_z2_config.json`",
}
"""Keys that we have as well, whose value names a file or a preset that is not there."""


IN_REWARD = (
    "there the KL is taken off the reward, and here it is a term of the loss: `kl_in_reward: true` with "
    "`kl_estimator: k1` and `scale_rewards: none` is that"
)
OTHER_REWARD_MODEL = (
    "a reward model of ours is trained with `stage: rm` and reads the policy's tokens: name it as `reward_model`"
)


def leave_evaluation(port: "Port", note: str = "there is no evaluation", changes_learning: bool = False) -> None:
    """Leave the keys of evaluations, of TRL's names, in a run that has none."""
    keys = "dataset_test_split do_eval eval_strategy eval_steps eval_on_start"
    keys += " load_best_model_at_end metric_for_best_model greater_is_better"
    port.leave(keys, note, changes_learning)


def put_cispo_bound(port: "Port") -> None:
    """Take over the bound of `loss_type: cispo`, of TRL's names: what a weight may be there, and may be more here."""
    if port.get("loss_type") != "cispo":
        return
    port.leave("epsilon", "the loss has no such bound", False)
    bound = float(port.get("epsilon_high", port.get("epsilon", 0.2)))
    is_same = bound > 1
    note = f"a weight may be {bound:g} there, and 1 + epsilon_high here" + ("" if is_same else ": 5, as TRL advises")
    fate = Fate.COMPUTED if port.has("epsilon_high") else Fate.DEFAULT
    port.put("epsilon_high", {"epsilon_high": bound - 1 if is_same else 4.0}, fate, note, not is_same)


def put_servers(port: "Port", uses_vllm: bool) -> None:
    """Take over the addresses of vLLM servers, of TRL's names, where completions are sampled by such.

    Without vLLM, keys of it are left.
    """
    if not uses_vllm:
        of_vllm = " ".join(key for key in port.source if key.startswith("vllm_"))
        port.leave(of_vllm, "it has no effect without `use_vllm`", False)
        return
    keys = "vllm_server_base_url vllm_server_host vllm_server_port"
    is_given = any(port.has(key) for key in keys.split())
    if str(port.get("vllm_mode", "server" if is_given else "colocate")) != "server":
        return
    port.leave(
        "vllm_tensor_parallel_size",
        "a server may have several devices of its own: `vllm_config: {tensor_parallel_size: 2}`",
    )
    hosts, ports = (_several(port.get(f"vllm_server_{name}")) for name in ("host", "port"))
    pairs = zip(hosts or ["localhost"] * max(1, len(ports)), ports or [8000] * max(1, len(hosts)), strict=False)
    addresses = [f"http://{'localhost' if host == '0.0.0.0' else host}:{number}" for host, number in pairs]
    urls = _several(port.get("vllm_server_base_url")) or addresses
    port.put(
        f"use_vllm vllm_mode {keys}",
        {"rollout_backend": "vllm_server", "vllm_server_urls": ",".join(map(str, urls))},
        note="start the servers as `grpo-stage serve` says: those of the other system have other routes",
    )


def _has_best_metric(values: SimpleNamespace) -> bool:
    try:
        check_best_metric(values)
    except ValueError:
        return False
    return True


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


class Port:
    """The recipe that is being made, and the account so far.

    Args:
        source: the file's keys; nested ones dotted.
        known: the keys of LLaMA-Factory and of this stage.
        has_no_effect: whether a key that is left changes nothing of what is learned.
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        known: Collection[str],
        has_no_effect: Callable[[str], bool] = WITHOUT_EFFECT.__contains__,
    ) -> None:
        self.source = dict(source)
        self.recipe: dict[str, Any] = {"stage": "grpo", "do_train": True}
        self.lines: list[Line] = []
        self._known = known
        self._has_no_effect = has_no_effect
        self._open = dict(source)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key that is given a fate elsewhere; None stands for a key that is not written."""
        value = self.source.get(key)
        return default if value is None else value

    def has(self, key: str) -> bool:
        return self.source.get(key) is not None

    def is_open(self, key: str) -> bool:
        """Whether a key has a value and no fate yet."""
        return self._open.get(key) is not None

    def put(
        self,
        keys: str,
        ours: Mapping[str, Any],
        fate: Fate = Fate.COMPUTED,
        note: str = "",
        changes_learning: bool = False,
    ) -> None:
        """Write keys of ours, and account for the keys (separated by spaces) that they come of."""
        self.recipe |= ours
        for key in keys.split():
            if key in self._open or fate is Fate.DEFAULT:
                self._open.pop(key, None)
                self.lines.append(Line(key, self.source.get(key), fate, dict(ours), note, changes_learning))

    def default(self, key: str, ours: Mapping[str, Any], note: str = "") -> None:
        """Write the other system's default of a key that the file does not have."""
        if not self.has(key):
            self.put(key, ours, Fate.DEFAULT, note)

    def leave(self, keys: str, note: str, changes_learning: bool | None = None) -> None:
        """Leave keys out; by default they count as changing what is learned unless they are known not to."""
        for key in keys.split():
            if key not in self._open:
                continue
            self._open.pop(key)
            changes = not self._has_no_effect(key) if changes_learning is None else changes_learning
            self.lines.append(Line(key, self.source[key], Fate.LEFT, {}, note, changes))

    def finish(self, table: Mapping[str, Entry]) -> None:
        """Give every key that is still open its fate: by the table, by TRL's names, or by its own."""
        for key, value in list(self._open.items()):
            if value is None:
                self.leave(key, "it has no value", False)
            elif key in table:
                self._by_entry(key, value, table[key])
            elif key in FILES:
                self.leave(key, FILES[key], False)
            elif key in TRL_KEYS:
                entry = TRL_KEYS[key]
                is_loss = entry.ours is None and not self._has_no_effect(key)
                self._by_entry(key, value, Entry(entry.ours, entry.convert, entry.note, is_loss))
            elif key in self._known:
                self._by_own_name(key, value)
            else:
                self.leave(key, "neither LLaMA-Factory nor this stage has such a key")
        self._leave_refused()

    def _leave_refused(self) -> None:
        """Leave or change keys of ours that this stage refuses beside the others, and other systems do not."""
        try:
            values = effective_defaults() | typed(self.recipe)
        except ValueError:  # a value of another type, which our own check tells of
            return
        self._fit_model(values)
        self._fit_advantages(values)
        if not is_neutral(SimpleNamespace(**values)):
            self._drop(_COMPARISONS, _OTHER_DISTRIBUTION, True, values)
        while idle := [key for key in self.recipe if not applies(ONLY_WITH.get(key, {}), values)]:
            self._drop(idle, f"`{', '.join(idle)}` would have no effect in this run", False, values)
        self._fit_whole_completions(values)
        self._fit_best(values)

    def _fit_model(self, values: dict[str, Any]) -> None:
        """Have the weights trained, and served by vLLM, in a way that this stage has."""
        if values["finetuning_type"] == "full":
            bits = ("quantization_bit", "quantization_method")
            self._drop(bits, "weights of few bits can only be trained with an adapter", True, values)
            self._drop(("use_dora",), "it has no effect where all weights are trained", False, values)
        elif values["sync_ref_model"] and values["ref_model"]:
            note = "an adapter's weights have no counterpart in another model (`ref_model`) to be mixed with"
            self._drop(["sync_ref_model"], note, True, values)
        if values["rollout_backend"] == "hf":
            return
        if values["additional_target"]:
            note = "vLLM serves no modules beside the LoRA layers (`additional_target`)"
            self._change("rollout_backend", {"rollout_backend": "hf"}, note, False, values)
            return
        if values["quantization_bit"] is not None and values["rollout_backend"] == "vllm_server":
            note = "servers hold the model as its files have it (`quantization_bit`): the device that trains samples"
            self._change("rollout_backend", {"rollout_backend": "vllm"}, note, False, values)
        if values["finetuning_type"] == "lora" and values["use_dora"]:
            note = "vLLM does not serve DoRA: it gets weights with the adapter in them"
            self._change("use_dora", {"use_dora": True, "vllm_lora": "merged"}, note, False, values)
        elif values["finetuning_type"] == "lora" and values["vllm_sleep"] == 2:
            note = "with 2 vLLM would forget the model under the adapter"
            self._change("vllm_sleep", {"vllm_sleep": 1}, note, False, values)

    def _fit_advantages(self, values: dict[str, Any]) -> None:
        """Leave a scale that the estimator does not go with, and a level of the ratio that the loss does not have."""
        estimator = ESTIMATORS.get(values["advantage_estimator"])
        if estimator is not None and values["scale_rewards"] not in ("auto", *estimator.scales):
            note = f"it does not go with `{values['advantage_estimator']}` here: {estimator.why_no_other_scale}"
            self._drop(["scale_rewards"], note, True, values)
        level = "importance_sampling_level"
        if values[level] != "token" and not applies(ONLY_WITH[level], values):
            self._drop([level], f"`loss_type: {values['loss_type']}` weighs tokens one by one here", True, values)

    def _fit_whole_completions(self, values: dict[str, Any]) -> None:
        """Leave or change what weighs single tokens, where the loss of each is that of its whole completion."""
        loss = LOSS_TYPES.get(values["loss_type"])
        if values["importance_sampling_level"] != "sequence" and (loss is None or not loss.tokenwise_remedy):
            return
        for term in TERMS:
            if term.tokenwise_remedy is None or values[term.key] not in term.values:
                continue
            note = "tokens are weighed one by one there; here the loss of each is that of its whole completion"
            if term.key == "rollout_correction":
                self._change(term.key, {term.key: "sequence"}, f"{note}, and so is its weight", True, values)
            else:
                self._drop([term.key], note, True, values)

    def _fit_best(self, values: dict[str, Any]) -> None:
        """Leave the choice of the best model where this stage has no such."""
        best = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
        v = SimpleNamespace(**values)
        if any(rule.broken(v) for rule in EVALUATION_RULES) or not _has_best_metric(v):
            self._drop(best, _BEST, True, values)

    def _change(
        self, key: str, ours: Mapping[str, Any], note: str, changes_learning: bool, values: dict[str, Any]
    ) -> None:
        """Give keys of ours other values, here and in `values`, and say so of what wrote `key`."""
        self.recipe |= ours
        values |= ours
        self.lines = [
            dataclasses.replace(
                line,
                fate=line.fate if line.fate is Fate.DEFAULT else Fate.COMPUTED,
                ours={**line.ours, **ours},
                note="; ".join(filter(None, (line.note, note))),
                changes_learning=line.changes_learning or changes_learning,
            )
            if key in line.ours
            else line
            for line in self.lines
        ]

    def _drop(self, keys: Collection[str], note: str, changes_learning: bool, values: dict[str, Any]) -> None:
        """Take keys of ours back, and their values out of `values`."""
        keys = [key for key in keys if key in self.recipe]
        for key in keys:
            del self.recipe[key]
            values[key] = effective_defaults()[key]
        lines = self.lines
        self.lines = []
        left = {line.key for line in lines if line.fate is Fate.LEFT}
        for line in lines:
            ours = {key: value for key, value in line.ours.items() if key not in keys}
            if ours or ours == line.ours:
                self.lines.append(dataclasses.replace(line, ours=ours))
            if ours == line.ours:
                continue
            is_gone = not ours and line.fate is not Fate.DEFAULT  # nothing is left of what the file does have
            if changes_learning or (is_gone and line.key not in left):
                self.lines.append(Line(line.key, line.value, Fate.LEFT, {}, note, changes_learning))

    def _by_entry(self, key: str, value: Any, entry: Entry) -> None:
        if entry.ours is None:
            self.leave(key, entry.note, entry.changes_learning)
            return
        ours = {entry.ours: entry.convert(value)}
        self.put(key, ours, Fate.TAKEN if ours == {key: value} else Fate.RENAMED, entry.note, entry.changes_learning)

    def _by_own_name(self, key: str, value: Any) -> None:
        refused = next((entry for entry in UNSUPPORTED if key in entry.keys.split()), None)
        if refused is not None:
            # A value without any effect need not be written either.
            self.leave(key, refused.reason, False if value in refused.harmless else None)
        else:
            self.put(key, {key: value}, Fate.TAKEN)
