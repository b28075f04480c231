"""The emphasis of the A1111 dialect, from its published rules."""

import pytest

from imaged.engine.prompt.grammar import parse

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
    (r"lone \ here", [("lone \\ here", 1)]),
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
]


@pytest.mark.parametrize(("prompt", "spans"), CASES)
def test_spans(prompt: str, spans: list[tuple[str, float]]) -> None:
    parsed = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in spans]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in spans])
