"""One gateway with a painter at once, for every client and every outcome."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import SLUG
from tests.contract.gate import Gate

PAGE = "https://app.example"
ALIASES = f"""
[alias.sketch]
model = "{SLUG}"
num_inference_steps = {{ low = 4, high = 8, default = 6 }}

[retired]
sdxl-old = "ask for {SLUG}"
"""


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    data = tmp_path_factory.mktemp("gate") / "data"
    data.mkdir()
    (data / "aliases.toml").write_text(ALIASES)
    with Gate(data, cors=PAGE).running() as running:
        yield running
