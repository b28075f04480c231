"""Prompts that change from step to step.

What is expected was derived from the dialect's published grammar, and compared with what the
reference implementation, its own grammar in its own parser, makes of the same strings: equal.
"""

from __future__ import annotations

from typing import Any

import pytest

from imaged.errors import BadParameter
from imaged.moderation.rules import MAX_TEXTS, texts_to_judge
from imaged.params.image_params import ImageParams
from imaged.prompt import Prompt, Reading
from imaged.prompt.a1111 import MAX_EDITS, texts
from imaged.sampling.schedulers import step_of_call, unet_calls

#: A prompt and what it says at each of four steps, or at all of them.
CASES: list[tuple[str, str | list[str]]] = [
    ("a house", "a house"),
    ("a [blue:red:2] house", ["a blue house", "a blue house", "a red house", "a red house"]),
    ("a [blue:red:0.5] house", ["a blue house", "a blue house", "a red house", "a red house"]),
    ("a [red:1] house", ["a  house", "a red house", "a red house", "a red house"]),
    ("a [red::3] house", ["a red house", "a red house", "a red house", "a  house"]),
    ("[a|b]", ["a", "b", "a", "b"]),
    ("[a|b|c]", ["a", "b", "c", "a"]),
    ("[|a] cat", [" cat", "a cat", " cat", "a cat"]),
    ("[fe|]male", ["female", "male", "female", "male"]),
    ("[a|(b:1.1)]", ["a", "(b:1.1)", "a", "(b:1.1)"]),
    ("[a|[b:c:2]]", ["a", "b", "a", "c"]),
    ("[[a|b]:c:2]", ["a", "b", "c", "c"]),
    ("a[b:[c:d:2]:1]e", ["abe", "ace", "ade", "ade"]),
    ("[(red:1.2):2] house", [" house", " house", "(red:1.2) house", "(red:1.2) house"]),
    ("(a [b:c:2]:1.3)", ["(a b:1.3)", "(a b:1.3)", "(a c:1.3)", "(a c:1.3)"]),
    ("a [[[b]]:2]", ["a ", "a ", "a [[b]]", "a [[b]]"]),
    ("[a : b : 1] c", ["a  c", " b  c", " b  c", " b  c"]),
    ("[a:b: 1 ]", ["a", "b", "b", "b"]),
    ("[a:b:+1]", ["a", "b", "b", "b"]),
    ("[a:b:1.]", "a"),
    ("[a:b:.25]", ["a", "b", "b", "b"]),
    ("[a:b:1e0]", ["a", "b", "b", "b"]),
    ("[a:b:0]", "b"),
    ("[a:b:-1]", "b"),
    ("[a:b:9]", "a"),
    ("[a:b:1.0]", "a"),
    ("[a:b:0.99]", ["a", "a", "a", "b"]),
    ("[:a:2]", ["", "", "a", "a"]),
    ("[::2]", ""),
    ("[:2]", ""),
    ("[2]", "[2]"),
    ("[]", "[]"),
    ("[|]", ""),
    ("[a:b:c]", "[a:b:c]"),
    ("[a:b:c:2]", "[a:b:c:2]"),
    ("[a:2:]", "[a:2:]"),
    ("[[a:2]:b:c]", ["[:b:c]", "[:b:c]", "[a:b:c]", "[a:b:c]"]),
    ("[a:b|c]", "[a:b|c]"),
    ("a|b [c:d:2]", "a|b [c:d:2]"),
    ("(a|b) [c:2]", "(a|b) [c:2]"),
    ("12:30 [a:2]", ["12:30 ", "12:30 ", "12:30 a", "12:30 a"]),
    ("\\[a:b:2\\]", "\\[a:b:2\\]"),
    ("[a\\:b:c:2]", ["a\\:b", "a\\:b", "c", "c"]),
    ("[a\\|b:2]", ["", "", "a\\|b", "a\\|b"]),
    ("[a:2] \\", "[a:2] \\"),
    ("[a:b:2", "[a:b:2"),
    ("a:b:2]", "a:b:2]"),
    ("[a:2]]", ["]", "]", "a]", "a]"]),
    ("[[a:2]", ["[", "[", "[a", "[a"]),
    ("([a:2]", ["(", "(", "(a", "(a"]),
    ("[a(b:2]", "[a(b:2]"),
    ("((a][b [c:2]", ["((a][b ", "((a][b ", "((a][b c", "((a][b c"]),
    ("[a\n:b:2]", ["a\n", "a\n", "b", "b"]),
    ("[a:1][b:2][c::3]", ["c", "ac", "abc", "ab"]),
    ("[x|y] and [1|2|3]", ["x and 1", "y and 2", "x and 3", "y and 1"]),
]


@pytest.mark.parametrize(("prompt", "said"), CASES)
def test_steps(prompt: str, said: str | list[str]) -> None:
    assert texts(prompt, 4) == (said if isinstance(said, list) else [said] * 4)


@pytest.mark.parametrize(
    "prompt",
    [
        *("[" * 20_000, "(" * 20_000, "|" * 20_000, "\\" * 19_999, ":" * 20_000),
        *("[a:" * 4_000 + ":1]" * 2_500, "[a|" * 5_000 + "]" * 5_000, "[a|b]" * 4_000),
        *("(" * 10_000 + ")" * 10_000, "[a:b:" + "9" * 19_000 + "]", "[a:b:" + " " * 19_000 + "]"),
        *(
            "\u202e[a:b:.5]\U0001f600" * 1_500,
            "[a:b:1e999]",
            "BREAK " * 3_000,
            "(a:1" + " " * 19_000,
        ),
    ],
    ids=lambda prompt: ascii(prompt[:8]),
)
def test_hostile_prompts_are_read(prompt: str) -> None:
    """Were one read in the square of its length, this would take minutes."""
    for text, pieces in Prompt(prompt, steps=100).spans.items():
        assert len(text) <= 20_000
        assert all(abs(weight) <= 100 for _, weight in pieces)


def test_too_many_edits_are_text() -> None:
    assert texts("[a:b:1]" * MAX_EDITS, 2) == ["a" * MAX_EDITS, "b" * MAX_EDITS]
    assert texts("[a:b:1]" * (MAX_EDITS + 1), 2) == ["[a:b:1]" * (MAX_EDITS + 1)] * 2


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_that_changes_too_often_is_refused(name: str) -> None:
    given: dict[str, Any] = {"prompt": "x"}
    often = "[a|b|c|d|e|f|g] [1|2|3|4|5|6|7|8|9|10|11]"
    with pytest.raises(BadParameter, match=f"{name} should say at most {MAX_TEXTS} different"):
        texts_to_judge(ImageParams(**{**given, name: often, "num_inference_steps": 100}))
    long = "[a|b|c|d|e|f]" + "x" * 19_000
    with pytest.raises(BadParameter, match="of 100000 characters in all"):
        texts_to_judge(ImageParams(**{**given, name: long}))


def test_in_plain_nothing_is_read() -> None:
    prompt = "[a|b] (c:1.2) BREAK"
    assert texts_to_judge(ImageParams(prompt, prompt_dialect="plain")) == [prompt]
    assert Prompt(prompt, Reading("plain")).spans == {prompt: ((prompt, 1.0),)}


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("Euler", [0, 1, 2, 3]), ("Heun", [0, 0, 1, 1, 2, 2, 3]), ("PNDM", [0, 0, 1, 2, 3])],
)
def test_calls_belong_to_steps(scheduler: str, steps: list[int]) -> None:
    calls = unet_calls(scheduler, 4)
    assert [step_of_call(scheduler, call) for call in range(calls)] == steps
