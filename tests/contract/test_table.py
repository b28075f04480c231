"""Every known fact has a test that exists, and the document says so."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.contract import table

#: The numbers of all facts that are certain or likely, so that a row that goes missing is missed.
KNOWN = """
1.1; 1.2; 1.3; 1.4; 1.5; 1.6; 1.7; 1.8; 1.9; 1.10; 1.12; 1.13; 1.14; 1.15; 1.16; 2.1; 2.2; 2.3;
2.4; 2.4/x-cost; 2.4/x-generation-time; 2.4/x-output-metadata; 2.4/x-rate-limit-reset-at-utc;
2.4/x-remaining-credits; 2.4/x-request-id; 2.4/x-seed-value; 2.6; 2.7; 2.8; 2.9; 2.10; 2.11;
2.12; 2.14; 2.17; 2.18; 2.19; 2.20; 2.21; 3.1; 3.1/default client; 3.1/prefix; 3.1/vm; 3.2;
3.2/COMPLETED; 3.2/FAILED; 3.2/PROCESSING; 3.2/QUEUED; 3.2/lower case; 3.2/states; 3.2/unknown;
3.3; 3.5; 3.5/after; 3.5/any code; 3.5/at once; 3.5/deadline; 3.5/gone; 3.5/limits; 3.5/objects;
3.5/run; 3.5/unreadable; 3.6; 3.7; 3.8; 3.9; 3.10; 3.11; 3.12; 3.13; 3.14; 3.15; 3.18; 3.19;
4.1; 4.1/price; 4.1/sample; 4.1/siblings; 4.1/table; 4.2; 4.2/enum; 4.3; 4.3/drawn; 4.3/same;
4.4; 4.5; 4.6; 4.7; 4.8; 4.9; 4.10; 5/400; 5/401; 5/403; 5/404; 5/404 credits; 5/405; 5/406;
5/406 team; 5/410; 5/422; 5/429; 5/500; 5/502; 5/504; 5/MCP; 5/MCP again; 5/MCP key; 5/billing;
5/shape; 6.1; 6.2; 6.3; 6.4; 6.5; 6.8; 6.9; 7.1; 8.1/attributes; 8.1/inference;
8.1/literal hosts; 8.1/module; 8.2/accounts; 8.2/files; 8.2/get; 8.2/history; 8.2/list;
8.2/models; 8.2/parameters_schema; 8.2/pixelflows, finetune, chat; 8.2/recent; 8.2/webhooks;
8.2/window; 8.3/body; 8.3/preflight; 8.3/text; 8.3/url; 8.4/bodies; 8.4/credits, health;
8.4/fooocus; 8.4/several; 8.4/slugs; 8.4/vendor; 8.4/vision-mcp; 9.1; 9.2; 9.3; 9.5; 9.6;
10/forms; 10/length
"""


def named_in(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def missing(facts: list[table.Fact]) -> list[str]:
    """Facts whose test is not there, or that are not filled in."""
    folder = Path(table.__file__).parent
    found = {f"{p.name}::{name}" for p in folder.glob("test_*.py") for name in named_in(p)}
    return [
        fact.number
        for fact in facts
        if fact.test not in found
        or fact.mark not in ("C", "L")
        or fact.verdict not in table.VERDICTS
        or not fact.says
    ]


def test_every_fact_has_its_test() -> None:
    facts = table.facts()
    assert missing(facts) == []
    assert missing([facts[0]._replace(test="test_v1.py::test_no_such")]) == [facts[0].number]


def numbers() -> list[str]:
    return [fact.number for fact in table.facts()] + [row[0] for row in table.left_out()]


def unanswered(listed: list[str]) -> set[str]:
    """Known facts that are not listed, and listed ones that are not known."""
    return set(KNOWN.replace("\n", " ").strip().split("; ")) ^ set(listed)


def test_no_fact_is_listed_twice_and_none_is_left_unanswered() -> None:
    listed = numbers()
    assert len(set(listed)) == len(listed)
    assert unanswered(listed) == set()
    for number in listed:
        assert unanswered([other for other in listed if other != number]) == {number}


def test_the_document_is_written_from_the_rows() -> None:
    assert table.DOCUMENT.read_text() == table.document()
