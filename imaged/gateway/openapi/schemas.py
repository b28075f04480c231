"""Request bodies as JSON schemas, made from the tables that their readers use: what each POST takes
beside a picture's parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaged.catalogue.aliases import widened
from imaged.gateway.api import drafts
from imaged.gateway.compat import a1111, openai
from imaged.gateway.submit import quotes
from imaged.params.knobs import KNOBS, Knob
from imaged.prompt import LORA_NAME, MAX_LORA_WEIGHT, MAX_LORAS
from imaged.provenance.receipts import FACTS
from imaged.store.webhooks.subscriptions import TYPES

Schema = dict[str, Any]
OPENAI, SDAPI = "/openai/v1/images/generations", "/sdapi/v1/txt2img"
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}


_LORA: Schema = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{LORA_NAME.pattern}$"},
        "weight": {"type": "number", "minimum": -MAX_LORA_WEIGHT, "maximum": MAX_LORA_WEIGHT},
    },
    "additionalProperties": False,
}


def knob(one: Knob) -> Schema:
    """JSON schema of a parameter, without what is accepted beside it (numbers as text)."""
    kinds = {"text": "string", "choice": "string", "loras": "array", "pair": "array"}
    found: Schema = {"type": kinds.get(one.kind, one.kind), "description": one.text}
    if one.kind == "text":
        found |= {"minLength": int(one.required), "maxLength": one.high}
    elif one.low is not None:
        bounds = {"minimum": one.low, "maximum": one.high}
        item = {"type": "integer", **bounds}
        found |= {"minItems": 2, "maxItems": 2, "items": item} if one.kind == "pair" else bounds
    if one.kind == "loras":
        found |= {"maxItems": MAX_LORAS, "items": {"anyOf": [TEXT, _LORA]}}
    if one.multiple > 1:
        found["multipleOf"] = one.multiple
    if one.choices:
        found["enum"] = list(one.choices)
    if one.default is not None:
        found["default"] = list(one.default) if one.kind == "loras" else one.default
    return found


def request(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Schema of a request object; other fields are ignored."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties}


def closed(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Schema of an object without other fields."""
    return {**request(required, optional), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def texts(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, TEXT)


WIDE = {one.name: knob(one) for one in widened()}
PICTURE = request(
    {one.name: knob(one) for one in KNOBS if one.required},
    {one.name: knob(one) for one in KNOBS if not one.required},
)

RECEIPT: Schema = {"type": "object", "required": [*FACTS, "key", "signature"]}
DRAFTED = request(
    {},
    {
        "draft": {
            "anyOf": [
                closed({"steps": {"type": "integer", "minimum": 1}}),
                closed(
                    {"fraction": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}
                ),
            ]
        }
    },
)
QUOTED = request({quotes.QUOTE_ID: {"type": "string", "minLength": 1}})

# -- requests ---------------------------------------------------------------------------------

_SUBSCRIPTION = {
    "webhook_url": {"type": "string", "format": "uri"},
    "event": request(
        {"types": {**listed({"enum": list(TYPES)}), "minItems": 1}},
    ),
}


def _neutral(table: Mapping[str, tuple[Any, ...]]) -> dict[str, Schema]:
    return {name: {"enum": list(values)} for name, values in table.items()}


#: Request schemas by path; /v1 and /v2 image routes take PICTURE.
REQUESTS: dict[str, Schema] = {
    "/v2/replay": request({"receipt": RECEIPT}),
    "/v2/requests/{job_id}/finish": closed(  # closed: what cannot change is refused
        {},
        {
            "samples": {**listed({"type": "integer", "minimum": 0}), "minItems": 1},
            **{name: WIDE[name] for name in drafts.CHANGES},
        },
    ),
    "/webhook/add": request(_SUBSCRIPTION),
    "/webhook/update": request({"webhook_id": TEXT, **_SUBSCRIPTION}),
    OPENAI: request(
        {"prompt": WIDE["prompt"]},
        {
            "model": TEXT,
            "n": WIDE["samples"],
            "size": {"type": "string", "pattern": rf"^(auto|{openai.SIZE.pattern})$"},
            "response_format": {"enum": ["url", "b64_json"]},
            "quality": {"enum": list(openai.QUALITIES)},
            "output_format": {"enum": ["png", "jpeg"]},
            **{name: WIDE[name] for name in openai.OURS},
            **_neutral(openai.UNSUPPORTED_FIELDS),
        },
    ),
    SDAPI: request(
        {"prompt": WIDE["prompt"]},
        {
            "negative_prompt": WIDE["negative_prompt"],
            "steps": WIDE["num_inference_steps"],
            "cfg_scale": WIDE["guidance_scale"],
            "width": WIDE["img_width"],
            "height": WIDE["img_height"],
            "seed": WIDE["seed"],
            "batch_size": {"type": "integer", "minimum": 1, "maximum": 4},
            "n_iter": {"type": "integer", "minimum": 1, "maximum": 4},
            "sampler_name": {"enum": list(a1111.OFFERED)},
            "scheduler": TEXT,
            "send_images": FLAG,
            "override_settings": {"type": "object", "properties": texts("sd_model_checkpoint")},
            "alwayson_scripts": {"type": "object"},
            **_neutral(a1111.UNSUPPORTED_FIELDS),
        },
    ),
}
