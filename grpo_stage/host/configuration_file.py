"""A recipe on the command line: a YAML or JSON file with `key=value` behind it, read as the host reads it.

What cannot be read is refused with the file, the place in it, and what to write. Nothing of the host is imported.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ENDINGS = (".yaml", ".yml", ".json")
_ONE_VARIABLE = re.compile(r"\$\{oc\.env:\w+\}")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


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
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # JSON is YAML
        if root is not None and not isinstance(root, yaml.MappingNode):
            kind = "a list" if isinstance(root, yaml.SequenceNode) else f"only the text `{_excerpt(root.value)}`"
            raise ValueError(f"{path} holds {kind}, and a recipe is a mapping. Write one `key: value` a line.")
        configuration = OmegaConf.load(Path(path).absolute())
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} cannot be read{_place(error)}: {_problem(error)}. Mend the file there.") from error
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
    """Refuse words behind a configuration file that are no `key=value`, which the host takes for keys without a value.

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

    The host leaves them as they are, so that a folder is called `${oc.env:HOME}`.

    Raises:
        ValueError: naming the key, the value, and what is undefined.
    """
    return {key: _resolved(key, value, values) if interpolates(value) else value for key, value in values.items()}


def _resolved(key: str, value: Any, values: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        OmegaConf.create({key: value})  # what is written in no valid form is this key's
        found = OmegaConf.create(values)[key]
        found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        raise ValueError(
            f"`{key}: {value}` refers to what cannot be found: {_problem(error)}. Define it, write the value itself, "
            r"or write `\${` where the text `${` is meant."
        ) from error
    if any("://" in text and not _ONE_VARIABLE.fullmatch(raw) for raw, text in _texts(value, found)):
        raise ValueError(
            f"`{key}: {value}` makes an address out of parts, by which a recipe could send what an environment "
            "variable holds to anyone. Write the whole address, or `${oc.env:NAME}` alone for a variable that holds "
            "all of it."
        )
    return found


def _texts(raw: Any, found: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value that interpolate, each with what it became."""
    if isinstance(raw, dict):
        for each, became in zip(raw.values(), found.values(), strict=True):
            yield from _texts(each, became)
    elif isinstance(raw, list | tuple):
        for each, became in zip(raw, found, strict=True):
            yield from _texts(each, became)
    elif interpolates(raw):
        yield raw, str(found)


def interpolates(value: Any) -> bool:
    """Whether a value refers to others or to the environment, at any depth."""
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


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: Exception) -> str:
    """What an exception of a library says, on one line."""
    text = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{text} {context}" if context else text


def _excerpt(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
