"""A line of `grpo-stage doctor`."""

from dataclasses import dataclass


OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    level: str
    """`OK`, `WARN` or `FAIL`."""
    said: str
    remedy: str = ""
