"""Every parameter: its default, its bounds, and an answer for everything wrong."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaged.errors import BadParameter, ImagedError, MalformedBody
from imaged.params.image_params import ImageParams, read_params
from imaged.params.knobs import KNOBS
from imaged.sampling.schedulers import ALIASES, SCHEDULERS, unet_calls

ODD: dict[str, tuple[Any, ...]] = {
    "prompt": (None, "", "  ", 5, ["x"], {"a": 1}, "a\0b", "\ud800", "x" * 20_001),
    "negative_prompt": (5, [], "a\0b", "\udfff", "x" * 20_001),
    "samples": (0, 5, -1, 1.5, "two", True, [], float("nan"), "1e999", ""),
    "scheduler": ("Euler b", "", 3, None.__class__, [], "euler\0"),
    "num_inference_steps": (19, 101, 20.5, "many", 10**400, float("inf"), {}),
    "guidance_scale": (0.99, 15.01, float("nan"), float("-inf"), "7,5", False, []),
    "seed": (-2, 10**15, 10**400, "9" * 401, 1.5, "0x10", "１", float("nan")),
    "img_width": (511, 513, 516, 2056, 0, -512, "wide", 1024.5, 2**64),
    "img_height": (511, 1001, 4096, "1e2", True, float("inf")),
    "base64": ("yes", 2, [], {}, 0.5, ""),
}
WRONG = [(field, value) for field, values in ODD.items() for value in values]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(BadParameter) as caught:
        read_params({"prompt": "a house", field: value})
    knob = next(k for k in KNOBS if k.name == field)
    assert caught.value.detail.startswith(field)
    assert knob.allowed in caught.value.detail
    json.dumps(caught.value.detail).encode()  # can be sent


@pytest.mark.parametrize("body", [None, [], "x", 5, True])
def test_body_must_be_an_object(body: object) -> None:
    with pytest.raises(MalformedBody):
        read_params(body)


def test_defaults() -> None:
    params, ignored = read_params({"prompt": "a house"})
    assert params == ImageParams("a house")
    assert ignored == []


def test_bounds_are_inclusive() -> None:
    for knob in KNOBS:
        for bound in (knob.low, knob.high):
            if knob.kind in ("integer", "number") and bound is not None:
                assert knob.read(bound) == bound


def test_lenient_typing_and_aliases() -> None:
    params, ignored = read_params(
        {
            "prompt": "a house",
            "samples": "2",
            "num_inference_steps": 30.0,
            "guidance_scale": "7.5",
            "seed": "468685",
            "width": 512,
            "height": "768",
            "negativePrompt": "trees",
            "base64": 1,
            "scheduler": "euler A",
            "refiner": True,
            "strength": 0.75,
        }
    )
    assert params == ImageParams("a house", "trees", 2, "Euler a", 30, 7.5, 468685, 512, 768, True)
    assert ignored == ["refiner", "strength"]


def test_own_name_wins_over_alias_and_null_is_absent() -> None:
    params, _ = read_params({"prompt": "x", "width": 512, "img_width": 768, "seed": None})
    assert (params.img_width, params.seed) == (768, -1)


def test_refusal_names_the_field_that_the_caller_wrote() -> None:
    with pytest.raises(BadParameter, match=r"^width should be a multiple of 8"):
        read_params({"prompt": "x", "width": 5})


def test_unet_calls() -> None:
    assert unet_calls("Euler", 25) == 25
    assert unet_calls("PNDM", 25) == 26
    assert unet_calls("Heun", 25) == unet_calls("DPM2 Karras", 25) == 49
    assert len(SCHEDULERS) == 13


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([k.name for k in KNOBS]), JSON, max_size=6).map(
        lambda d: {"prompt": "x"} | d
    )
)
def test_any_json_is_read_or_refused(body: dict[str, object]) -> None:
    try:
        params, _ = read_params(body)
    except ImagedError as error:
        assert error.status == 400
        return
    for knob in KNOBS:
        value = getattr(params, knob.name)
        assert value == knob.default or knob.read(value) == value


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("euler A", "Euler a"),
        ("K_EULER_ANCESTRAL", "Euler a"),
        ("sample_euler", "Euler"),
        ("EulerDiscreteScheduler", "Euler"),
        ("DPM++2M karras", "DPM++ 2M Karras"),
        ("dpmpp_2m", "DPM Multi"),
        ("KarrasDPM", "DPM++ 2M Karras"),
        ("k_dpm_2_a_ka", "DPM2 a Karras"),
        ("plms", "PNDM"),
        ("UniPCMultistep", "UniPC"),
    ],
)
def test_schedulers_have_other_names(written: str, meant: str) -> None:
    assert read_params({"prompt": "x", "scheduler": written})[0].scheduler == meant


def test_names_mean_one_scheduler_each() -> None:
    for scheduler, names in ALIASES.items():
        for name in (scheduler, *names):
            assert read_params({"prompt": "x", "scheduler": name})[0].scheduler == scheduler


@pytest.mark.parametrize(
    ("written", "nearest"),
    [("Eulr", "Euler"), ("DPM2", "DPM2 Karras"), ("DPM++ 3M SDE Karras", "DPM++ 2M Karras")],
)
def test_unknown_schedulers_are_answered_with_the_list_and_the_nearest(
    written: str, nearest: str
) -> None:
    with pytest.raises(BadParameter) as caught:
        read_params({"prompt": "x", "scheduler": written})
    assert all(f'"{name}"' in caught.value.detail for name in SCHEDULERS)
    assert caught.value.detail.endswith(f'not "{written}"; the nearest is "{nearest}"')


@pytest.mark.parametrize("written", ["", "zzzz", "x" * 20_000, 5, "\ud800"])
def test_what_is_near_to_none_is_answered_with_the_list(written: Any) -> None:
    with pytest.raises(BadParameter) as caught:
        read_params({"prompt": "x", "scheduler": written})
    assert caught.value.detail.endswith('"UniPC"')


def test_a_profile_by_default_is_for_the_schedulers_that_it_has() -> None:
    knobs = [replace(k, default="a1111") if k.name == "scheduler_profile" else k for k in KNOBS]
    for scheduler, profile in (("Euler", "a1111"), ("PNDM", "diffusers")):
        params, _ = read_params({"prompt": "x", "scheduler": scheduler}, knobs)
        assert params.scheduler_profile == profile


def test_guidance_cannot_end_before_it_starts() -> None:
    with pytest.raises(BadParameter, match="guidance_start should not be more than guidance_end"):
        read_params({"prompt": "x", "guidance_start": 0.8, "guidance_end": 0.2})
