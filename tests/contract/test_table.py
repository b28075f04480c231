"""Every known fact has a test that exists, and the document says so."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.contract import table


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


def test_no_fact_is_listed_twice() -> None:
    numbers = [fact.number for fact in table.facts()] + [row[0] for row in table.left_out()]
    assert len(set(numbers)) == len(numbers)


def test_the_document_is_written_from_the_rows() -> None:
    assert table.DOCUMENT.read_text() == table.document()
