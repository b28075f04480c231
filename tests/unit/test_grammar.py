"""The emphasis of the A1111 dialect, from its published rules."""

import pytest

from imaged.prompt.a1111 import spans

UP = 1.1

CASES: list[tuple[str, list[tuple[str, float]]]] = [
    ("", [("", 1)]),
    ("a house", [("a house", 1)]),
    ("a (red) house", [("a ", 1), ("red", UP), (" house", 1)]),
    ("a ((red)) house", [("a ", 1), ("red", UP**2), (" house", 1)]),
    ("a [red] house", [("a ", 1), ("red", 1 / UP), (" house", 1)]),
    ("(red:1.3)", [("red", 1.3)]),
    ("(red: 1.3 )", [("red", 1.3)]),
    ("(red:.5)", [("red", 0.5)]),
    ("(red:-1)", [("red", -1)]),
    ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
    ("((low light:1.4))", [("low light", 1.4 * UP)]),
    (r"\(plain\)", [("(plain)", 1)]),
    (r"\[plain\]", [("[plain]", 1)]),
    (r"back\\slash", [("back\\slash", 1)]),
    (r"lone \ here", [("lone  here", 1)]),
    (r"a\b", [("ab", 1)]),
    ("(x:" + "9" * 400 + ")", [("x", 100)]),
    ("(x:-" + "9" * 400 + ")", [("x", -100)]),
    (r"(a \(b\) c)", [("a (b) c", UP)]),
    ("(never closed", [("never closed", UP)]),
    ("never opened)", [("never opened)", 1)]),
    ("[never closed", [("never closed", 1 / UP)]),
    ("never opened]", [("never opened]", 1)]),
    ("a:b", [("a:b", 1)]),
    ("12:30 (noon)", [("12:30 ", 1), ("noon", UP)]),
    ("(freckles:0.5, moles:0.5)", [("freckles:0.5, moles", 0.5)]),
    ("(worst quality, low quality:1.4)", [("worst quality, low quality", 1.4)]),
    ("(a)(b)", [("ab", UP)]),
    ("()", [("", 1)]),
    ("(:1.5)", [("", 1)]),
    ("a:1.5)", [("a:1.5)", 1)]),
    ("[a:1.5)", [("a:1.5)", 1 / UP)]),
    ("a cat BREAK a dog", [("a cat", 1), ("BREAK", 1), ("a dog", 1)]),
    ("(a\nBREAK b:2)", [("a", 2), ("BREAK", 2), ("b", 2)]),
    ("BREAKS are no break", [("BREAKS are no break", 1)]),
    ("BREAK", [("", 1), ("BREAK", 1), ("", 1)]),
]


@pytest.mark.parametrize(("prompt", "expected"), CASES)
def test_spans(prompt: str, expected: list[tuple[str, float]]) -> None:
    parsed = spans(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in expected]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    "prompt",
    ["(" * 20_000, "[" * 20_000, "(a" * 10_000, "(" * 5_000 + "a" + ")" * 5_000, "(a:1)" * 4_000],
    ids=lambda prompt: prompt[:6],
)
def test_deep_nesting_has_finite_weights(prompt: str) -> None:
    assert all(abs(weight) <= 100 for _, weight in spans(prompt))
