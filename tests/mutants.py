"""A property that matters shows its mutant: the code is broken on purpose, and a check goes red."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def red(
    owner: Any,
    name: str,
    mutant: object,
    *,
    raises: type[BaseException] = AssertionError,
    match: str = "",
) -> Iterator[None]:
    """The block checks a property, with a mutant in the place of what is right; it has to fail.

    For checks that fail for one reason, or say which (`match`): where a mutant may break more than
    what is checked, the test compares what comes of it itself.

    owner: what has this name, a module, a class or an object; of a dictionary, an entry.
    """
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(owner, dict):
            patch.setitem(owner, name, mutant)
        else:
            patch.setattr(owner, name, mutant)
        try:
            yield
        except raises as error:
            if re.search(match, str(error)):
                return
            raise
    place = getattr(owner, "__qualname__", getattr(owner, "__name__", type(owner).__name__))
    pytest.fail(f"with {mutant!r} as {name} of {place} the check stays green")
