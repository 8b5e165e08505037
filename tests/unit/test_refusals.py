"""One refusal or all of them, from checks that raise."""

import pytest

from grpo_stage.algorithm.refusals import apart, gathering, has_refused, named_keys, stop_if_refused


def explain(error: Exception) -> str | None:
    return str(error) if isinstance(error, ValueError) else None


def refuse(text: str) -> None:
    raise ValueError(text)


def test_all_refusals_are_gathered_and_each_once() -> None:
    reached = []
    with gathering(explain) as texts:
        for text in ("first", "second", "first"):
            with apart():
                refuse(text)
        reached.append("after them")
        assert has_refused()
        stop_if_refused()
        reached.append("what needs them")
    assert texts == ["first", "second"]
    assert reached == ["after them"]
    assert not has_refused()


def test_a_refusal_outside_of_any_block_is_the_last() -> None:
    with gathering(explain) as texts:
        refuse("only")
    assert texts == ["only"]


def test_elsewhere_the_first_refusal_is_raised() -> None:
    with pytest.raises(ValueError, match="first"), apart():
        refuse("first")
    stop_if_refused()


def test_other_exceptions_are_not_refusals() -> None:
    with pytest.raises(ZeroDivisionError), gathering(explain), apart():
        _ = 1 / 0
    assert not has_refused()


def test_keys_are_named_in_backquotes_or_first() -> None:
    known = {"beta", "reward_funcs", "seed"}
    assert named_keys("`beta: 1` goes with `seed`, and seed is none of `num`", known) == ("beta", "seed")
    assert named_keys("reward_funcs: two functions", known) == ("reward_funcs",)
    assert named_keys("reward 'own.py:score': there is no file", known) == ("reward_funcs",)
    assert named_keys("no key at all", known) == ()
