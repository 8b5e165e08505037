"""The fields of the GRPO panel: the list of them, their widgets, and the conversion of values to arguments and back.

Fields come from the stage's own arguments, so that a new key appears in the panel by itself, and from `HOST_FIELDS`:
keys of the host that matter to this stage and have no field in the Board. The form shows them in sections: `BASICS`,
which is what everyone sets, and then the groups of the arguments with the rest.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gradio as gr

from grpo_stage.algorithm.combinations import ONLY_WITH, WITH_TOOLS
from grpo_stage.algorithm.conditions import Allowed, applies
from grpo_stage.arguments import EVALUATION, MEMORY, OBJECTIVE, REWARDS, ROLLOUT, GRPOArguments
from grpo_stage.board.locales import PREFIX
from grpo_stage.rewards.options import REWARD_MODEL
from grpo_stage.rewards.registry import BUILTIN_REWARDS


Kind = Literal["choice", "flag", "whole", "number", "text", "list", "mapping"]

BASICS = "Basics"
"""The section that is open in a new form."""
_SET_BY_EVERYONE = (
    *("reward_funcs", "reward_weights", "num_generations", "max_new_tokens"),
    *("max_steps", "seed", "save_strategy", "save_total_limit"),
    *("default_system", "reference_column"),
    *("rollout_backend", "eval_dataset", "eval_steps", "eval_num_generations"),
)
"""The keys of that section, in the order of its fields. Those that have a field of the host are not repeated."""
GROUPS = tuple(dict.fromkeys(spec.metadata["group"] for spec in dataclasses.fields(GRPOArguments)))
SECTIONS = (BASICS, *GROUPS)
_INITIAL_VALUES = MappingProxyType({"log_completions": True})
"""Values of the form that differ from the defaults of a run: the run view needs `log_completions`."""
_LISTS = MappingProxyType({"reward_funcs": (*BUILTIN_REWARDS, REWARD_MODEL), "tools": ()})
"""Comma-separated keys that the form shows as a multi-select, with its choices."""
_TOOLS = frozenset({"tools", "environment"})
"""One of these gives the model what it may call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormField:
    """One key of a recipe, as the panel shows it."""

    key: str
    group: str
    kind: Kind
    default: Any = None
    """The value of the key if it is not written."""
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    help: str = ""
    num_lines: int = 1
    """The height of a field for text."""

    @property
    def section(self) -> str:
        """The section of the form."""
        return BASICS if self.key in _SET_BY_EVERYONE else self.group

    @property
    def only_with(self) -> Mapping[str, Allowed]:
        """The values of other keys with which this key has an effect."""
        return ONLY_WITH.get(self.key, {})

    @property
    def depends_on(self) -> frozenset[str]:
        """The keys whose values decide whether this one has an effect."""
        return frozenset(self.only_with) | (_TOOLS if self.key in WITH_TOOLS else frozenset())

    def applies(self, run: Mapping[str, Any]) -> bool:
        """Whether this key has an effect beside the values of the others; elsewhere its field is hidden."""
        has_tools = any(run.get(key) for key in _TOOLS)
        return applies(self.only_with, run) and (has_tools or self.key not in WITH_TOOLS)

    @property
    def element(self) -> str:
        """The name of the widget and of its texts in the Board's train tab."""
        return PREFIX + self.key

    @property
    def initial(self) -> Any:
        """The widget's value in a new form."""
        return self.to_widget(_INITIAL_VALUES.get(self.key, self.default))

    def widget(self) -> gr.components.Component:
        """A new widget; its texts follow from the Board's language."""
        shared = {"value": self.initial, "elem_id": self.element}
        if self.kind == "choice":
            return gr.Dropdown(choices=list(self.choices), **shared)
        if self.kind == "flag":
            return gr.Checkbox(**shared)
        if self.kind == "list":
            return gr.Dropdown(choices=list(self.choices), multiselect=True, allow_custom_value=True, **shared)
        if self.kind == "text" or self.kind == "mapping":
            return gr.Textbox(lines=self.num_lines, **shared)
        # Without the widget's own precision and bounds: it would round silently, and its error on a value beyond
        # them does not name the field. The stage's own check does.
        return gr.Number(
            step=1 if self.kind == "whole" else 0.01,
            placeholder="–",  # noqa: RUF001 (a blank number shows 0 otherwise)
            **shared,
        )

    def to_argument(self, value: Any) -> Any:
        """The widget's value as in a recipe; None if the widget is empty.

        Raises:
            ValueError: if the text for a mapping is no mapping.
        """
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            return None
        if self.kind == "list":
            return list(value) if any("," in item for item in value) else ",".join(value)
        if self.kind == "mapping":
            return _mapping(self.key, value)
        return value

    def to_widget(self, argument: Any) -> Any:
        """The widget's value for an argument of a recipe."""
        if self.kind == "list":
            items = argument.split(",") if isinstance(argument, str) else argument or []
            return [str(item).strip() for item in items]
        if isinstance(argument, Mapping):
            return json.dumps(argument, ensure_ascii=False)
        if self.kind in ("text", "mapping"):
            return "" if argument is None else _as_text(argument)
        return argument

    def takes(self, argument: Any) -> bool:
        """Whether the widget can hold an argument of a recipe, in its type and bounds."""
        if argument is None:
            return self.default is None
        if self.kind == "choice":
            return argument in self.choices
        if self.kind == "flag":
            return isinstance(argument, bool)
        if self.kind in ("whole", "number"):
            is_number = isinstance(argument, int if self.kind == "whole" else int | float)
            low, high = self.minimum, self.maximum
            return (
                is_number
                and not isinstance(argument, bool)
                and (low is None or argument >= low)
                and (high is None or argument <= high)
            )
        return isinstance(argument, str | int | float | list | tuple | Mapping) and not isinstance(argument, bool)


def _mapping(key: str, value: str) -> dict[str, Any]:
    try:
        mapping = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{key}: {value}` is not valid JSON: {error}. Mend it, or leave it empty.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"`{key}: {value}` is not a mapping. Write it in braces, or leave it empty.")
    return mapping


def _as_text(argument: Any) -> str:
    return ",".join(map(str, argument)) if isinstance(argument, list | tuple) else str(argument)


# With this stage's defaults: the host's generation defaults sample from another distribution than the policy.
HOST_FIELDS: tuple[FormField, ...] = (
    FormField(key="max_new_tokens", group=ROLLOUT, kind="whole", default=1024, minimum=1),
    FormField(key="temperature", group=ROLLOUT, kind="number", default=1.0, minimum=0),
    FormField(key="top_p", group=ROLLOUT, kind="number", default=1.0, minimum=0, maximum=1),
    FormField(key="top_k", group=ROLLOUT, kind="whole", default=0, minimum=0),
    FormField(key="repetition_penalty", group=ROLLOUT, kind="number", default=1.0, minimum=0),
    FormField(key="reward_model", group=REWARDS, kind="text"),
    FormField(key="reward_model_type", group=REWARDS, kind="choice", choices=("lora", "full", "api"), default="lora"),
    FormField(key="reward_model_adapters", group=REWARDS, kind="text"),
    FormField(key="reward_model_quantization_bit", group=REWARDS, kind="choice", choices=(None, 8, 4)),
    FormField(key="ref_model", group=OBJECTIVE, kind="text"),
    FormField(key="ref_model_adapters", group=OBJECTIVE, kind="text"),
    FormField(key="ref_model_quantization_bit", group=OBJECTIVE, kind="choice", choices=(None, 8, 4)),
    FormField(key="default_system", group=BASICS, kind="text", num_lines=2),
    # The empty field stands for the default, -1, which is no limit.
    FormField(key="max_steps", group=BASICS, kind="whole", minimum=1),
    FormField(key="seed", group=BASICS, kind="whole", default=42, minimum=0),
    FormField(key="save_strategy", group=BASICS, kind="choice", choices=("steps", "epoch", "no"), default="steps"),
    FormField(key="save_total_limit", group=BASICS, kind="whole", minimum=1),
    FormField(key="eval_dataset", group=EVALUATION, kind="list"),
    FormField(key="eval_steps", group=EVALUATION, kind="whole", minimum=1),
    FormField(key="vllm_gpu_util", group=MEMORY, kind="number", minimum=0, maximum=1),
    FormField(key="vllm_maxlen", group=MEMORY, kind="whole", minimum=1),
    FormField(key="vllm_enforce_eager", group=MEMORY, kind="flag", default=False),
    FormField(key="vllm_config", group=MEMORY, kind="mapping"),
)


def _own_field(spec: "dataclasses.Field[Any]", hint: Any) -> FormField:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = [member for member in members if member is not type(None)]
    choices: tuple[Any, ...] = ()
    kind: Kind
    if get_origin(types[0]) is Literal:
        kind, choices = "choice", get_args(types[0])
        if type(None) in members:
            choices = (None, *choices)
    elif spec.name in _LISTS:
        kind, choices = "list", tuple(_LISTS[spec.name])
    elif dict in types and spec.default is None:
        kind = "mapping"
    elif dict in types:  # a word or a mapping, which the arguments read out of its text
        kind = "text"
    else:
        kinds: dict[type, Kind] = {bool: "flag", int: "whole", float: "number", str: "text"}
        kind = kinds[types[0]]
    metadata = spec.metadata
    return FormField(
        key=spec.name,
        group=metadata["group"],
        kind=kind,
        default=spec.default,
        choices=choices,
        minimum=metadata.get("min", metadata.get("above")),
        maximum=metadata.get("max"),
        help=metadata["help"],
    )


def _own_fields() -> Iterable[FormField]:
    hints = get_type_hints(GRPOArguments)
    return (_own_field(spec, hints[spec.name]) for spec in dataclasses.fields(GRPOArguments))


def _place(field: FormField) -> tuple[int, int]:
    return SECTIONS.index(field.section), field.section == BASICS and _SET_BY_EVERYONE.index(field.key)


FORM_FIELDS: tuple[FormField, ...] = tuple(sorted((*_own_fields(), *HOST_FIELDS), key=_place))
"""All fields, by section; in each section but the first the stage's own come first."""


def effective(values: Mapping[str, Any], eval_strategy: str) -> dict[str, Any]:
    """The effective values of all fields, by key: a field without effect beside the others has its default.

    Args:
        values: arguments by key; fields that are missing have their defaults.
        eval_strategy: that of the run; conditions depend on it, and it has no field.
    """
    given = {field.key: values.get(field.key, field.default) for field in FORM_FIELDS}
    current = {**given, "eval_strategy": eval_strategy}
    while True:  # a condition may depend on a key that has a condition itself
        settled = {field.key: given[field.key] if field.applies(current) else field.default for field in FORM_FIELDS}
        settled["eval_strategy"] = eval_strategy
        if settled == current:
            return current
        current = settled
