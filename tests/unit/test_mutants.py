"""What plants mutants and what waits: a check that sees nothing is told, and so is what never came.

The tests that use them lean on that.
"""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.conftest import until, until_async
from tests.mutants import red


def doubled(x: float) -> float:
    return math.floor(x) * 2.0


def test_a_check_that_goes_red_is_as_it_should_be() -> None:
    with red(math, "floor", lambda x: x + 1):
        assert doubled(2.5) == 4.0
    assert doubled(2.5) == 4.0  # and the mutant has gone


def test_an_entry_of_a_dictionary_is_planted_too() -> None:
    def check(found: dict[str, int]) -> None:
        if found["one"] != 1:
            raise ValueError(f"one is {found['one']}")

    table = {"one": 1}
    with red(table, "one", 2, raises=ValueError, match="one is 2"):
        check(table)
    assert table == {"one": 1}


def test_a_check_that_stays_green_is_told() -> None:
    def ceiling(x: float) -> int:
        return math.ceil(x)

    with (
        pytest.raises(pytest.fail.Exception, match=r"ceiling.* as floor of math .*stays green"),
        red(math, "floor", ceiling),
    ):
        assert doubled(2.0) == 4.0
    assert math.floor(2.5) == 2


def test_another_failure_is_no_sign() -> None:
    with pytest.raises(ZeroDivisionError), red(math, "floor", lambda x: 1 // 0):
        assert doubled(2.0) == 4.0
    with (
        pytest.raises(AssertionError, match="something else"),
        red(math, "e", 3, match="what is checked"),
    ):
        raise AssertionError("something else")
    assert math.e < 3


def test_what_came_true_is_returned() -> None:
    answers = iter([None, "", "there"])
    assert until(lambda: next(answers), every_s=0) == "there"
    later = iter([None, 0, 7])
    assert asyncio.run(until_async(lambda: next(later), every_s=0)) == 7


def test_what_never_came_is_told() -> None:
    with pytest.raises(AssertionError, match="the log of it"):
        until(lambda: None, 0, say=lambda: "the log of it")
    with pytest.raises(AssertionError, match="it never came true"):
        asyncio.run(until_async(lambda: None, 0))
