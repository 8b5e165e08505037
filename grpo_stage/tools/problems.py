"""All problems of a recipe at once, by the checks that a run ends at one by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_stage.algorithm.refusals import gathering, named_keys
from grpo_stage.tools.recipe_file import mistake_in


if TYPE_CHECKING:
    from grpo_stage.host.inputs import Preparation
    from grpo_stage.host.run_arguments import RunArguments


_NEEDED = frozenset(
    {"stage", "do_train", "model_name_or_path", "dataset", "reward_funcs", "reward_model", "output_dir"}
)
"""Keys that nothing can be checked without: they are never left out."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run would be refused."""

    text: str
    keys: tuple[str, ...]
    """The keys that its first sentence names; it is about the first one. Empty if it names none."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A run that is ready for its weights."""

    arguments: "RunArguments"
    values: Mapping[str, Any]
    """Every key's value as parsed; the host's loaders change the arguments."""
    preparation: "Preparation"
    """Its rewards are to be closed."""


def find_problems(configuration: Mapping[str, Any]) -> tuple[list[Problem], Checked | None]:
    """Everything that a run refuses before it loads weights, and the run if that is nothing.

    Checks build on one another: the data is read once the keys are right. So keys that are refused are left out, and
    the rest is checked again, until nothing new is found. What is said then about a key that was left out is a
    consequence, and is dropped.
    """
    from grpo_stage.host.inputs import prepare
    from grpo_stage.host.parser import known_key_names, parse
    from grpo_stage.records.redaction import mask_text, secrets_in

    secrets = secrets_in(dict(configuration))
    known = known_key_names() | configuration.keys()
    problems: list[Problem] = []
    left: dict[str, Any] = dict(configuration)
    while True:
        checked = None
        with gathering(lambda error: mistake_in(error, configuration)) as texts:
            arguments = parse(dict(left))
            values = dict(vars(arguments.values()))
            checked = Checked(arguments, values, prepare(arguments))
        gone = configuration.keys() - left.keys()
        new = [Problem(mask_text(text, secrets), named_keys(text.split(". ")[0], known)) for text in texts]
        for problem in new:
            if problem not in problems and not gone & set(named_keys(problem.text, known)):
                problems.append(problem)
        if not problems:
            return [], checked
        if checked is not None:
            checked.preparation.rewards.close()
        refused = {next((key for key in problem.keys if key not in gone), None) for problem in new}
        refused &= left.keys() - _NEEDED
        if not refused:
            return _without_consequences(problems), None
        left = {key: value for key, value in left.items() if key not in refused}


def _without_consequences(problems: list[Problem]) -> list[Problem]:
    """One problem for each fault: without relations to a key that is refused for itself, and once about a key."""
    faulty = {problem.keys[0] for problem in problems if len(problem.keys) == 1}
    kept: list[Problem] = []
    for problem in problems:
        is_relation = len(problem.keys) > 1 and not faulty.isdisjoint(problem.keys)
        is_told = bool(problem.keys) and any(problem.keys[:1] == other.keys[:1] for other in kept)
        if not is_relation and not is_told:
            kept.append(problem)
    return kept
