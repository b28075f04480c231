"""The dialect compel against the package: its parser, and its vectors over its own pipeline."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from compel import Compel, CompelForSDXL
from compel.prompt_parser import Blend

from imaged.catalogue.model import MICRO
from imaged.engine.prompt.encode import PromptEncoder
from imaged.errors import BadParameter, JobFailed
from imaged.moderation.rules import texts_to_judge
from imaged.params.image_params import read_params
from imaged.prompt import Prompt, Reading
from imaged.prompt.compel import Structure, parse
from imaged.prompt.embeddings import Embeddings
from imaged.prompt.report import Reader
from imaged.prompt.tokenizer import Tokenizer
from tests.mutants import red
from tests.tolerance import difference, in_float64, rounding

COMPEL = Reading("compel")
PROMPTS = [
    "a red house by a lake",
    "a red++ house by a (blue lake)1.3",
    "a red-- house, (snowed mountains)0.5",
    "a (big (red house)1.5)+ by a lake---",
    '("a red house", "snowed mountains, noon").and()',
    '("a red house", "a blue+ boat").blend(0.7, 0.3)',
    '("a red house", "a blue boat").blend(1, 1, no_normalize)',
    "a red house. " * 40,
    "",
]
#: Brackets that nest more than twice, or anything long, would take that parser minutes.
TEXTS = [
    *("a (red)1.3 house++ by a lake-- (b c)0.5", "red, blue+, 8k", "'quoted', it's", "a (b)"),
    *("snow-covered, 10-20++", "(snow-covered trees--)+, x", "+y -x", "(a:1.3, f/1.8++)2"),
    *('"a quoted text"+ rest', '(red "blue house"1.2)', "a \\(b\\) c", "(a \\) b)1.5", "(a, b).7"),
    *("lake,,  x", "a  \t b", "café++, 🏔", "(red)", "((red)+ blue)-", "end. next", "(end. next)+"),
    *('("a b", "c (d)2").and(1,0.5)', '("a","b").blend(0.7, 0.3)', '("a, b", "c").and()'),
    *('("a-, \'quoted\'", "f/1.8++").blend(1,1,no_normalize)', "('a' b)1.1"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MICRO / "tokenizer")


def by_tokens(spans: Any, tokenizer: Tokenizer) -> list[tuple[list[int], float]]:
    """Pieces as the text encoders get them: how their texts are spaced makes no difference."""
    found: list[tuple[list[int], float]] = []
    for text, weight in spans:
        ids = tokenizer.ids(text)
        if found and ids and found[-1][1] == pytest.approx(weight):
            found[-1] = (found[-1][0] + ids, weight)
        elif ids:
            found.append((ids, round(weight, 6)))
    return found


def told(structure: Structure, tokenizer: Tokenizer) -> Any:
    parts = structure.parts
    return [p.weight for p in parts], [by_tokens(p.spans, tokenizer) for p in parts]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_read_as_by_its_parser(text: str, tokenizer: Tokenizer) -> None:
    theirs = Compel.parse_prompt_string(text)
    prompts, weights = theirs.prompts, theirs.weights
    ours = parse(text)
    assert (ours.kind == "blend") == isinstance(prompts[0], Blend)
    if isinstance(prompts[0], Blend):
        assert ours.normalized == prompts[0].normalize_weights
        prompts, weights = prompts[0].prompts, prompts[0].weights
    expected = [by_tokens(((f.text, f.weight) for f in p.children), tokenizer) for p in prompts]
    assert told(ours, tokenizer) == (pytest.approx(weights), expected)


@pytest.fixture(scope="module")
def reference(theirs: Any) -> Any:
    return CompelForSDXL(theirs)


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p[:40])
@torch.inference_mode()
def test_vectors_are_its_own(prompt: str, nets: Any, theirs: Any, reference: Any) -> None:
    negative = "a blue sky--"
    ours, other = PromptEncoder(nets).pair(prompt, negative, COMPEL)
    with in_float64(theirs.text_encoder, theirs.text_encoder_2):
        exact = reference(prompt, negative_prompt=negative)
    expected = reference(prompt, negative_prompt=negative)
    for mine, name in (
        (ours.context, "embeds"),
        (ours.pooled, "pooled_embeds"),
        (other.context, "negative_embeds"),
        (other.pooled, "negative_pooled_embeds"),
    ):
        [their], [wide] = getattr(expected, name), getattr(exact, name)
        assert mine.shape == their.shape and wide.dtype == torch.float64
        assert difference(mine, their) <= rounding(their, wide)


@torch.inference_mode()
def test_parts_have_weights(nets: Any) -> None:
    """Where the package's own SDXL pipeline fails: beside the empty text it gets a pooled one."""
    encoder = PromptEncoder(nets)
    whole, half, none = (
        encoder.pair(f'("a red house", "a lake").and(1, {weight})', None, COMPEL)[0].context
        for weight in (1, 0.5, 0)
    )
    empty, _ = encoder.pair("", None, COMPEL)
    with in_float64(nets.text_encoder, nets.text_encoder_2):
        exact, _ = PromptEncoder(nets).pair("", None, COMPEL)
    bound = rounding(empty.context, exact.context)
    assert difference(half, (whole + none) / 2) <= bound
    assert difference(none[77:], empty.context) <= bound


@torch.inference_mode()
def test_it_is_another_dialect(nets: Any) -> None:
    """Weights do something else than in A1111, and without the mask the vectors differ."""
    encoder = PromptEncoder(nets)
    prompt = "a red house, (snowed mountains)0.5"
    ours, _ = encoder.pair(prompt, None, COMPEL)
    other, _ = encoder.pair("a red house, (snowed mountains:0.5)", None)
    assert not torch.allclose(ours.context, other.context, atol=1e-3)
    forward = type(nets.text_encoder).forward
    with red(type(nets.text_encoder), "forward", lambda self, *args: forward(self, *args[:4])):
        blind, _ = PromptEncoder(nets).pair(prompt, None, COMPEL)
        assert torch.allclose(ours.context, blind.context, atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a (red house", "should close every bracket and quote"),
        ("a red ) house", "should have an opening bracket or quote for the ) at 7"),
        ('a "red house', "should close every bracket"),
        ("a cat.swap(dog)", "should not have swap in it"),
        ("(a).attend(1.3)", "should not have attend"),
        ("a useLora(x)", "should not have useLora"),
        ('("a", "b").and(1)', "should have no number or 2 of them in .and()"),
        ('("a", "b").blend(x, 1)', "should have no number or 2"),
        ('"a", "b".blend(1, 1)', "should have brackets around what .blend() is said of"),
        ("(" + ", ".join(["a"] * 9) + ").and()", "should have at most 8 parts"),
        ('("a", "b").blend(1, -1)', "that do not cancel out"),
        ('("a", "b").and(1, 101)', "should have numbers between -100 and 100"),
        ('("a", "b").and(1, ' + "9" * 400 + ")", "should have no number or 2"),
        ("(" * 70 + "a" + ")" * 70, "should not have more than 64 brackets open"),
        (" ".join(f"a{'-' * n}" for n in range(1, 70)), "at most 64 pieces"),
    ],
)
def test_what_is_not_well_formed_is_refused(prompt: str, problem: str) -> None:
    for name, body in (("prompt", {"prompt": prompt}), ("negative_prompt", {"prompt": "x"})):
        params, _ = read_params({**body, "prompt_dialect": "compel", name: prompt})
        with pytest.raises(BadParameter) as refused:
            texts_to_judge(params)
        assert str(refused.value).startswith(f"{name} in the dialect compel should")
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    "prompt", ["a (ch)++ild (x)0.1", "x naked (chi)1.1(ld)1.3 y", '("a chi", "x").and()']
)
def test_rules_hear_through_it(prompt: str) -> None:
    said = texts_to_judge(read_params({"prompt": prompt, "prompt_dialect": "compel"})[0])
    assert any("chi" in text for text in said) and len(said) >= 3
    if "x naked" in prompt:
        assert "x naked child y" in said


@pytest.mark.parametrize(
    "text",
    [
        "red " * 200,
        "a red house, " * 30,
        "one. two, three. " * 20,
        "a" * 300,
        "word, " * 30 + "x " * 60,
    ],
    ids=lambda t: t[:16],
)
def test_windows_are_cut_as_by_the_package(text: str, nets: Any, theirs: Any) -> None:
    provider = CompelForSDXL(theirs).compel_1.conditioning_provider
    ids, _, _ = provider.get_token_ids_and_expand_weights([text], [1.0], device="cpu")
    expected = [
        int((w[1:] == provider.tokenizer.eos_token_id).int().argmax()) for w in ids.view(-1, 77)
    ]
    reader = Reader((nets.tokenizer, nets.tokenizer_2), Embeddings(None, (0, 0)))
    told = reader.report(Prompt(text, COMPEL, 20))["texts"][0]
    assert [len(w["tokens"]) for w in told["encoders"][0]["windows"]] == expected
    assert told["windows"] == len(expected) == told["passes"]


@pytest.mark.parametrize(
    "prompt",
    [
        *("(" * 20_000, "(a" * 10_000, ")" * 20_000, "+" * 20_000, '"' * 20_000, "a+ b- " * 3000),
        *("\\" * 20_000, "(a)1" * 5000, "1." * 10_000, ".and(" * 4000, "🏔️+" * 5000),
        *("\u202e(" * 9000, "(" * 10_000 + ")" * 10_000, '("a",' * 4000),
        "( " * 60 + "a" + " )+" * 60,
        *("a" + " " * 19_000 + "b", "a" + " " * 9000 + "." + " " * 9000 + "b"),
        *('("a").and(' + "1" * 19_000 + "x)", '("a","b").and(' + "1," * 9000 + ")"),
    ],
    ids=lambda p: p[:10],
)
def test_hostile_texts_are_read_or_refused_at_once(prompt: str) -> None:
    began = time.process_time()
    try:
        parse(prompt)
    except BadParameter as refused:
        assert len(str(refused)) < 300
    assert time.process_time() - began < 1.0  # 50 ms on an idle machine; its own parser: for ever


def test_what_would_take_too_long_is_refused(nets: Any) -> None:
    prompt = " ".join(f"(a red house by a lake, {'very ' * 20} far)0.{n}" for n in range(10, 60))
    with pytest.raises(JobFailed, match="at most 64 passes"):
        PromptEncoder(nets).pair(prompt, None, COMPEL)
