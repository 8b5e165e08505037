"""Whether two formulas are equal, as math-verify decides. That may take for ever: run it in a worker."""

from functools import lru_cache
from typing import Any

from grpo_stage.rewards.answers.numbers import RELATIVE_TOLERANCE


_DIGITS = 30


def are_equal(reference: str, answer: str) -> bool:
    """True where the formula `answer` equals `reference`; both as `plain` writes them.

    Values are compared up to a relative 1e-9, whole numbers exactly; formulas with variables as math-verify does.
    """
    from math_verify import verify

    gold, predicted = _parse_reference(reference), _parse(answer)
    if not gold or not predicted:
        return False
    try:
        if _is_value(gold[0]) and _is_value(predicted[0]):
            return _are_close(gold[0], predicted[0])
    except Exception:  # sympy may raise anything; a formula without a value equals none
        return False
    return verify(gold, predicted, float_rounding=12, numeric_precision=_DIGITS, timeout_seconds=None)


@lru_cache(maxsize=256)
def _parse_reference(text: str) -> list[Any]:
    return _parse(text)


def _parse(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"\\boxed{{{text}}}",
        extraction_config=(LatexExtractionConfig(boxed_match_priority=0),),
        fallback_mode="no_fallback",  # not the text itself where parsing fails
        extraction_mode="first_match",
        parsing_timeout=None,
    )[:1]


def _is_value(expression: Any) -> bool:
    import sympy  # type: ignore[import-untyped]

    return isinstance(expression, sympy.Expr) and not expression.free_symbols and expression.is_number is True


def _are_close(one: Any, other: Any) -> bool:
    """Up to a relative 1e-9. math-verify rounds to 6 decimals, which makes all tiny numbers equal."""
    one, other = one.doit(), other.doit()
    if one.is_Rational and other.is_Rational:
        difference, larger = abs(one - other), max(abs(one), abs(other))
        is_whole = one.is_Integer and other.is_Integer
        return bool(difference == 0 or (not is_whole and difference * RELATIVE_TOLERANCE.denominator <= larger))
    one, other = one.evalf(_DIGITS), other.evalf(_DIGITS)
    if one.is_finite is not True or other.is_finite is not True:
        return bool(one == other and one.is_infinite)
    larger = max(abs(one), abs(other))
    return bool(abs(one - other) * RELATIVE_TOLERANCE.denominator <= larger)
