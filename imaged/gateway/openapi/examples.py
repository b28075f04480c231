"""Requests as examples, by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaged.catalogue.model import DEFAULT_SLUG

HOUSE = {"prompt": "a red house by a blue lake, snowed mountains, sunset", "seed": 7}
HOOK = {"webhook_url": "https://example.com/pictures", "event": {"types": ["GENERATION"]}}
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "/v1/{slug}": {**HOUSE, "img_width": 1024, "img_height": 1024},
    "/v2/{slug}": {**HOUSE, "samples": 2, "num_inference_steps": 30},
    "/v2/{slug}/preflight": {**HOUSE, "draft": {"steps": 8}},
    "/v2/requests/{job_id}/finish": {"samples": [0]},
    "/webhook/add": HOOK,
    "/webhook/update": {**HOOK, "webhook_id": "1"},
    "/openai/v1/images/generations": {
        "model": DEFAULT_SLUG,
        "prompt": HOUSE["prompt"],
        "size": "1024x1024",
        "response_format": "b64_json",
    },
    "/sdapi/v1/txt2img": {
        "prompt": HOUSE["prompt"],
        "steps": 25,
        "cfg_scale": 7,
        "sampler_name": "DPM++ 2M",
        "width": 512,
        "height": 512,
    },
}
