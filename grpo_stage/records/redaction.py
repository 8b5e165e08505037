"""Masking of secrets (keys, tokens, passwords) of a recipe in files, logs and messages.

A value is a secret by its name (`api_key`, `password`, ...), by its own form (`sk-...`, `hf_...`), or by its place in
a URL. These are rules of thumb: under a name like `key` or `token` a value counts only if it looks random; a word, a
special token of a template, a path or a number does not.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote


MASK = "***"
_remembered: set[str] = set()
_MIN_REPLACED = 4
"""Shorter secrets are masked at their own place alone: in other texts they would match too much."""

_PASSWORDS = r"password|passwd|passphrase|pwd|secret|credentials?|authorization|bearer|cookie"
_OWNERS = (
    "api|access|private|secret|auth|authentication|service|account|hub|hf|license|signing|encryption|subscription|"
    "master|admin|user|session|refresh|bot|webhook|openai|anthropic|wandb|swanlab|github|client"
)
_SURELY_SECRET = re.compile(rf"(?:{_PASSWORDS}|webhookurl|(?:{_OWNERS})(?:key|token))s?$")
_MAYBE_SECRET = re.compile(r"(?:keys?|token|auth)$")
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[^\s<>\[\]]{12,}")
_WORD = r"(?:[A-Za-z]?[a-z]{2,}\d{0,2}[a-z]?|[A-Z]{2,}\d{0,2}|[vV]?\d{1,4})"
_PLAIN = re.compile(rf"\.{{0,2}}/.*|{_WORD}(?:[_.:/-]?{_WORD})*")
"""A text with letters and digits that still is a name or a path."""
_REFERENCE = re.compile(r"\$\{[^}]*\}")
"""A reference to another value, such as `${oc.env:NAME}`."""

_TOKEN = re.compile(
    r"\b(?:"
    r"(?<!/)sk-(?=[\w-]*\d)[\w-]{6,}(?![\w/-])|hf_[A-Za-z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{10,}|github_pat_\w{10,}|"
    r"A(?:KIA|SIA)[A-Z0-9]{12,}|xox[abprs]-[\w-]{8,}|glpat-[\w-]{10,}|AIza[\w-]{20,}|gsk_[A-Za-z0-9]{10,}|"
    r"npm_[A-Za-z0-9]{20,}|pypi-[\w-]{20,}|r8_[A-Za-z0-9]{20,}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?"
    r")"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SCHEME = r"(?:Bearer|Basic|Token)\s+"
_AUTHORIZATION = re.compile(
    rf"(?P<kept>Authorization[\"']?\s*[:=]\s*[\"']?(?:{_SCHEME})?+)(?P<secret>[\w.~+/=-]{{6,}})", re.IGNORECASE
)
_HEADER = re.compile(rf"\b(?P<kept>{_SCHEME})(?P<secret>(?=[\w.~+/=-]*\d)[\w.~+/=-]{{16,}})")
_USER_INFO = re.compile(r"(?P<kept>\b[a-z][a-z0-9+.-]*://[^\s/:@?#]*:)(?P<secret>[^\s/?#]+)(?=@)", re.IGNORECASE)
_QUERY = re.compile(
    rf"(?P<kept>[?&;](?:[\w.-]*(?:{_PASSWORDS}|key|token|auth|signature|sig))=)(?P<secret>[^\s&#;'\"]+)", re.IGNORECASE
)
_PAIR = re.compile(
    rf"(?P<kept>(?P<quote>[\"'])[\w-]*(?:{_PASSWORDS}|(?:{_OWNERS})[_-]?(?:key|token))(?P=quote)\s*:\s*[\"'])"
    r"(?P<secret>[^\"'\n]+)",
    re.IGNORECASE,
)
"""A name and its value, as JSON and Python write mappings."""
_FORMS = (_AUTHORIZATION, _PAIR, _TOKEN, _PRIVATE_KEY, _HEADER, _USER_INFO, _QUERY)


def remember(secrets: Collection[str]) -> None:
    """Mask these values everywhere from now on: the value of an environment variable has no name to go by."""
    _remembered.update(secrets)


def mask(value: Any, name: str = "") -> Any:
    """`value` with its secrets replaced by `MASK`, mappings and lists to any depth.

    Args:
        value: anything; only texts, numbers, mappings and lists are masked.
        name: the key of the value.
    """
    if isinstance(value, Mapping):
        return {key: mask(item, name if _is_secret_name(name) else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item, name) for item in value]
    if is_secret(name, value):
        return MASK
    return mask_text(value) if isinstance(value, str) else value


def secrets_in(value: Any, name: str = "") -> set[str]:
    """The secrets that `mask` would replace, as texts."""
    if isinstance(value, Mapping):
        return {s for key, v in value.items() for s in secrets_in(v, name if _is_secret_name(name) else str(key))}
    if isinstance(value, list | tuple):
        return {secret for item in value for secret in secrets_in(item, name)}
    text = value if isinstance(value, str) else ""
    parts = {found["secret"] if found.groupdict() else found[0] for form in _FORMS for found in form.finditer(text)}
    return parts | ({str(value)} if is_secret(name, value) else set())


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a value, mappings and lists to any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(item)


def mask_text(text: str, secrets: Collection[str] = ()) -> str:
    """`text` without these secrets, quoted or not, and without texts that look like a secret."""
    for secret in sorted({*secrets, *_remembered}, key=len, reverse=True):
        if len(secret) >= _MIN_REPLACED:
            for form in (secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")):
                text = text.replace(form, MASK)
    for pattern in _FORMS:
        text = pattern.sub(lambda found: f"{found.groupdict().get('kept', '')}{MASK}", text)
    return text


@contextmanager
def errors_masked(*recipe: Any) -> Iterator[None]:
    """Mask the secrets of `recipe` (a recipe's values) in errors that the block raises, and in their causes."""
    try:
        yield
    except Exception as error:
        secrets = {secret for part in recipe for secret in secrets_in(part)}
        mask_error(error, secrets)
        if (text := mask_text(str(error), secrets)) != str(error):  # masking its arguments did not mask its text
            raise RuntimeError(f"{type(error).__name__}: {text}") from None
        raise


def mask_error(error: BaseException | None, secrets: Collection[str]) -> None:
    """Mask the texts of an exception and of its causes, in place."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(mask_text(arg, secrets) if isinstance(arg, str) else arg for arg in error.args)
        for name, value in vars(error).items():
            if isinstance(value, str) and (masked := mask_text(value, secrets)) != value:
                setattr(error, name, masked)
        origin = error.__cause__ or error.__context__
        if origin is not None and mask_text(str(origin), secrets) != str(origin):
            mask_error(origin, secrets)
            if mask_text(str(origin), secrets) != str(origin):  # masking its arguments did not mask its text
                error.__cause__, error.__context__ = None, None
        error = origin


def is_secret(name: str, value: Any) -> bool:
    """Whether a single value is a secret, by its name or by its own form."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value in ("", MASK):
        return False
    normal = _normal(name)
    if isinstance(value, str) and _REFERENCE.fullmatch(value):
        return False
    if _SURELY_SECRET.search(normal):
        return True
    if not isinstance(value, str) or not _MAYBE_SECRET.search(normal):
        return False
    return bool(_RANDOM.fullmatch(value)) and not _PLAIN.fullmatch(value)


def _is_secret_name(name: str) -> bool:
    return bool(_SURELY_SECRET.search(_normal(name)) or _MAYBE_SECRET.search(_normal(name)))


def _normal(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
