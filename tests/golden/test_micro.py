"""The shipped checkpoint against its judge: does it paint what held-out prompts say?"""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from imaged.catalogue.model import MICRO
from training.micro.evaluate import Exam, share
from training.micro.sheets import generate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exam() -> Exam:
    return Exam(MICRO, prompts=6)


@pytest.fixture(scope="module")
def pictures(exam: Exam) -> list[Image.Image]:
    return generate(exam.nets, exam.jobs, "adherence")


def test_pictures_show_what_their_prompts_say(exam: Exam, pictures: list[Image.Image]) -> None:
    right = share(exam.mark(pictures)["marks"])
    assert right >= 0.85
    of_another_prompt = [*pictures[1:], pictures[0]]
    assert share(exam.mark(of_another_prompt)["marks"]) < right - 0.25


def test_pictures_are_neither_black_nor_burnt(exam: Exam, pictures: list[Image.Image]) -> None:
    assert exam.mark(pictures)["clipped"] < 0.05
    extremes: list[Any] = [p.getextrema() for p in pictures]  # a pair for each colour
    assert all(max(hi - lo for lo, hi in colours) > 100 for colours in extremes)
