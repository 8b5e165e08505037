"""A recipe on the command line: a YAML or JSON file with `key=value` behind it, read as the host reads it.

Errors name the file, the place in it, and what to write. Nothing of the host is imported.
"""

import inspect
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_stage.records.redaction import mask_text, remember, secrets_in


STAGE = "grpo"
RawArguments = dict[str, Any] | list[str]
"""A run's arguments before they are parsed: a mapping, or command-line flags."""
ENDINGS = (".yaml", ".yml", ".json")
_ONE_VARIABLE = re.compile(r"\$\{oc\.env:\w+(?:,[^${}]*)?\}")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|true|false", re.IGNORECASE)
_FOLDERS = (
    "output_dir",
    "logging_dir",
    "cache_dir",
    "dataset_dir",
    "media_dir",
    "tokenized_path",
    "resume_from_checkpoint",
)
_MODELS = (
    "model_name_or_path",
    "adapter_name_or_path",
    "ref_model",
    "ref_model_adapters",
    "reward_model",
    "reward_model_adapters",
)
_MEND_REFERENCE = r"Where the text `${` is meant, write `\${`, in single quotes: 'a \${b}'."
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def stage_of(arguments: RawArguments) -> str | None:
    """The stage in arguments that are not parsed yet."""
    if isinstance(arguments, dict):
        return arguments.get("stage")
    stage = None
    for position, flag in enumerate(arguments):
        if flag.startswith("--stage="):
            stage = flag.removeprefix("--stage=")
        elif arguments[position - 1 : position] == ["--stage"]:
            stage = flag
    return stage


def read_command_line(arguments: list[str]) -> RawArguments:
    """Read arguments as the host does: a YAML or JSON file followed by overrides, or flags.

    Raises:
        ValueError: if they are neither, or the file cannot be read.
    """
    if not arguments or not arguments[0].endswith(ENDINGS):
        check_first_word(arguments)
        return arguments
    path, *overrides = arguments
    configuration = read_configuration(path, overrides)
    if stage_of(configuration) == STAGE:
        check_overrides(overrides)
    return configuration


def read_configuration(path: str, overrides: list[str]) -> dict[str, Any]:
    """The keys of a configuration file, with `overrides` over them.

    Raises:
        ValueError: naming the file, the place in it, the reason and the remedy.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = _text_of(path)
    try:
        content = _content_of(text, is_json=path.endswith(".json"))
        if content is not None and not isinstance(content, dict):
            kind = "a list" if isinstance(content, list) else f"only the text `{_excerpt(content)}`"
            raise ValueError(f"{path} holds {kind}, and a recipe is a mapping. Write one `key: value` a line.")
        configuration = OmegaConf.create(content or {})
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read{_place(error)}: {_problem(error)}. Mend the file there.") from error
    except OmegaConfBaseException as error:
        key = f" at `{error.full_key}`" if error.full_key else ""
        raise ValueError(f"{path} cannot be read{key}: {_problem(error)}. {_MEND_REFERENCE}") from error
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(configuration, OmegaConf.from_cli(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(
            f"`{' '.join(overrides)}` behind {path} cannot be read: {_problem(error)}. Write `key=value`, in quotes "
            "where the value holds a space, a bracket or a comma."
        ) from error
    assert isinstance(merged, dict)
    if not merged:
        raise ValueError(f"{path} is empty: it holds no key. Write `stage: grpo` into it, and the keys of a recipe.")
    return merged  # type: ignore[return-value]


def check_overrides(overrides: list[str]) -> None:
    """Refuse words after a configuration file that are no `key=value`: the host takes them for keys without a value.

    Raises:
        ValueError: naming the word and what to write.
    """
    for position, word in enumerate(overrides):
        key, has_value, value = word.partition("=")
        if key and has_value and not key.startswith("-"):
            continue
        before, after = overrides[:position][-1:], overrides[position + 1 :][:1]
        if word.endswith(ENDINGS):
            remedy = "Name one file, and write what another one has as `key=value`."
        elif before and before[0].endswith("="):
            remedy = f"Write `{before[0]}{word}`, without a space."
        else:
            remedy = f"Write `{key.lstrip('-').replace('-', '_') or 'key'}={value or (after or ['value'])[0]}`."
        raise ValueError(f"`{word}` is no `key=value`, the form of what stands behind a configuration file. {remedy}")


def check_first_word(arguments: list[str]) -> None:
    """Refuse a command line that begins with neither a configuration file nor a flag.

    Raises:
        ValueError: naming the word and what to write.
    """
    if not arguments or arguments[0].startswith("-") or any(word.startswith("--") for word in arguments):
        return
    path = arguments[0]
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder. Name the configuration file, such as {os.path.join(path, 'x.yaml')}.")
    raise ValueError(
        f"{path} is no configuration file: the name of one ends with {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}. "
        "Rename it, or write flags as `--key value`."
    )


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    r"""The values with OmegaConf's `${key}` and `${oc.env:NAME}` replaced; `\${` stands for the text itself.

    The host does not replace them, so that a folder would be called `${oc.env:HOME}`. A recipe must not be able to
    send environment variables elsewhere, so `oc.env` is accepted only if the value stays on this machine, or if its
    key is that of a secret. Secrets from the environment are masked in messages.

    Raises:
        ValueError: naming the key, the value, and the part that is undefined or may not read the environment.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    referring = [key for key, value in values.items() if interpolates(value)]
    for key in referring:
        try:
            OmegaConf.create({key: values[key]})
        except OmegaConfBaseException as error:
            raise ValueError(f"`{key}: {values[key]}` cannot be read: {_problem(error)}. {_MEND_REFERENCE}") from error
    return {**values, **{key: _resolved(key, values) for key in referring}}


def _resolved(key: str, values: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    value = values[key]
    with _environment_read() as read:
        try:
            found = OmegaConf.create(values)[key]
            found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except OmegaConfBaseException as error:
            problem = mask_text(_problem(error), read.values())
            raise ValueError(
                f"`{key}: {value}` refers to what cannot be found: {problem}. Define it, or write the value itself. "
                f"{_MEND_REFERENCE}"
            ) from (None if read else error)
    secrets = {
        secret
        for name, text in read.items()
        if not _NUMBER.fullmatch(text) and not os.path.exists(text)  # such as `PWD`
        for secret in secrets_in(text, name)
    }
    remember(secrets)
    if read and not all(_may_read(key, raw, text, secrets) for raw, text in _texts(value, found)):
        raise ValueError(
            f"`{key}: {value}` reads {', '.join(read)} of the environment, by which a recipe could send it to anyone: "
            "`${oc.env:NAME}` counts in `reward_kwargs`, in tokens, in folders and absolute paths without a secret in "
            "them, for numbers, and as the whole of `reward_model`. Write the value itself, or `key=value` on the "
            f"command line. {_MEND_REFERENCE}"
        )
    return found


@contextmanager
def _environment_read() -> Iterator[dict[str, str]]:
    """The variables that `oc.env` reads in this block, with their values."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    read: dict[str, str] = {}

    def env(name: str, *default: Any) -> str | None:
        if name in os.environ:
            read[name] = os.environ[name]
        return oc.env(name, *default)

    register: Any = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:  # before omegaconf 2.4
        register = OmegaConf.register_new_resolver
    register("oc.env", env, replace=True)
    try:
        yield read
    finally:
        register("oc.env", oc.env, replace=True)


def _may_read(key: str, raw: str, text: str, secrets: set[str]) -> bool:
    """Whether the value of `key`, written `raw` and resolved to `text`, may contain an environment variable."""
    if key == "reward_kwargs" or key.endswith(("_token", "_api_key")) or _NUMBER.fullmatch(text):
        return True
    if key == "reward_model" and _ONE_VARIABLE.fullmatch(raw):
        return True
    if any(secret in text for secret in secrets):
        return False
    paths = [part.strip() for part in text.split(",")]
    # A colon is part of an address, or of a place such as `REMOTE:owner/name` and `hf::`.
    is_here = key in _FOLDERS or (key in _MODELS and all(path.startswith(("/", "./", "../")) for path in paths))
    return is_here and ":" not in text


def _texts(raw: Any, found: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value that interpolate, each with its resolved text."""
    if isinstance(raw, dict):
        for each, became in zip(raw.values(), found.values(), strict=True):
            yield from _texts(each, became)
    elif isinstance(raw, list | tuple):
        for each, became in zip(raw, found, strict=True):
            yield from _texts(each, became)
    elif interpolates(raw):
        yield raw, str(found)


def interpolates(value: Any) -> bool:
    """Whether a value, at any depth, refers to other keys or to the environment."""
    if isinstance(value, dict):
        return any(map(interpolates, value.values()))
    if isinstance(value, list | tuple):
        return any(map(interpolates, value))
    return isinstance(value, str) and "${" in value


def _text_of(path: str) -> str:
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, and a recipe is a file. Name the file in it.")
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist (looked for from {os.getcwd()}). Give the path of the recipe's file.")
    content = Path(path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        encoding = "UTF-16" if content.startswith(_UTF_16) else f"another encoding than UTF-8 (line {line})"
        raise ValueError(f"{path} is in {encoding}, and a recipe is read as UTF-8. Save it as UTF-8.") from error


def _content_of(text: str, is_json: bool) -> Any:
    import yaml
    from omegaconf import OmegaConf

    if is_json:
        return json.loads(text.removeprefix("\ufeff"))
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and not isinstance(root, yaml.MappingNode):
        return [] if isinstance(root, yaml.SequenceNode) else root.value
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def _place(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at line {error.lineno}, column {error.colno}"
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: Exception) -> str:
    """The message of a library's exception, on one line."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    text = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{text} {context}" if context else text


def _excerpt(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
