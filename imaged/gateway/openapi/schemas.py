"""Bodies as JSON schemas: what each POST takes beside a picture's parameters, and what each path
answers. Requests are made from the tables that their readers use; answers are closed, so that a
field that is not described here fails a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imaged.catalogue.aliases import widened
from imaged.gateway.api import drafts, webhooks
from imaged.gateway.compat import a1111, openai, segmind
from imaged.gateway.present import bodies
from imaged.gateway.submit import quotes
from imaged.jobs import State
from imaged.params.knobs import KNOBS, Knob
from imaged.prompt.loras import LORA_NAME, MAX_LORA_WEIGHT, MAX_LORAS
from imaged.provenance.receipts import FACTS
from imaged.store.webhooks.subscriptions import TYPES

Schema = dict[str, Any]
OPENAI, SDAPI = "/openai/v1/images/generations", "/sdapi/v1/txt2img"
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}
_PIXELS: Schema = {"type": "object", "required": ["width", "height", "sha256"]}


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


def answer(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    """Schema of an answer object, without other fields."""
    return {**request(required, optional), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def maybe(kind: Schema) -> Schema:
    return {**kind, "type": [kind["type"], "null"]}


def texts(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, TEXT)


def numbers(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, NUMBER)


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
                answer({"steps": {"type": "integer", "minimum": 1}}),
                answer(
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
    "/v2/requests/{job_id}/finish": answer(  # closed: what cannot change is refused
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

# -- answers ----------------------------------------------------------------------------------

_STAMP = dict.fromkeys(bodies.STAMP, maybe(TEXT))
_METRICS = answer(
    {},
    {
        **numbers("inference_time", "queue_time", "total_time", "cost", "remaining_credits"),
        "retry_count": INTEGER,
    },
)
_STATE = {"enum": list(dict.fromkeys(str(bodies.WIRE.get(state, state)) for state in State))}
_OF_A_JOB = {"status": _STATE, **texts("request_id", "status_url", "response_url")}
_IMAGE = answer(
    {
        **texts("url", "content_type", "file_name"),
        **dict.fromkeys(("file_size", "width", "height", "seed"), INTEGER),
    },
    {"base64": TEXT, "receipt": RECEIPT},
)
_STEPS = dict.fromkeys(("step", "steps", "unet_calls_done", "unet_calls"), INTEGER)
_PREVIEW = answer({"content_type": TEXT, "base64": TEXT, "call": INTEGER})
_JOB = answer(
    {**_OF_A_JOB, "metrics": _METRICS},
    {
        **_STEPS,
        **texts("output", "error", "code"),
        "preview": _PREVIEW,
        "progress": answer({"parked": FLAG, "until": TEXT}),
        "images": listed(_IMAGE),
        "finish_url": TEXT,
    },
)
_COUNTS: Schema = {"type": "object", "additionalProperties": INTEGER}
_READ = answer(
    {
        **texts("dialect", "emphasis"),
        "windows": INTEGER,
        "texts": listed(
            answer(
                {
                    "steps": listed(listed(INTEGER)),
                    "pieces": listed(answer({}, {"text": TEXT, "weight": NUMBER, "break": FLAG})),
                    "windows": INTEGER,
                    "encoders": listed(
                        answer(
                            {
                                "tokens": INTEGER,
                                "windows": listed(
                                    answer({"tokens": listed(TEXT), "weights": listed(NUMBER)})
                                ),
                            }
                        )
                    ),
                },
                {"kind": TEXT, "weights": listed(NUMBER), "passes": INTEGER},
            )
        ),
        "left_out": INTEGER,
        "embeddings": answer({"found": _COUNTS, "missing": listed(TEXT)}),
        "characters": listed(
            answer({**texts("character", "code_point", "name", "read_as"), "count": INTEGER})
        ),
    }
)
_PROMPTS = answer({"prompt": _READ, "negative_prompt": maybe(_READ)})
_SCHEDULER = answer(
    {
        **texts("name", "class", "profile"),
        "aliases": listed(TEXT),
        "settings": {"type": "object"},
        **dict.fromkeys(("steps", "unet_calls"), INTEGER),
        **dict.fromkeys(("timesteps", "sigmas"), listed(NUMBER)),
        "parity": NUMBER,
    }
)
_SECONDS = answer(numbers("low", "expected", "high"))
_RESULT = answer(
    {
        "status": {"const": "COMPLETED"},
        **texts("request_id", "output", "seed", "prompt"),
        "images": listed(_IMAGE),
        "metrics": _METRICS,
        "timings": answer(numbers("inference")),
        **_STAMP,
    },
    {"prompts": _PROMPTS},
)
_IN_BASE64 = answer(
    {
        "image": {"anyOf": [TEXT, listed(TEXT)]},
        **texts("status", "request_id"),
        "infer_time": NUMBER,
        "seed": INTEGER,
        **_STAMP,
    },
    {"prompts": _PROMPTS},
)
_PARAMS = answer(
    {
        one.name: {"type": [knob(one)["type"], "null"]}
        if one.default is None
        else {"type": knob(one)["type"]}
        for one in KNOBS
    }
)
_PREFLIGHT = answer(
    {
        **texts("quote_id", "expires_at", "model", "checkpoint", "determinism"),
        "cost": NUMBER,
        "unet_calls": INTEGER,
        "expected": maybe(answer({"jobs": INTEGER, "wait_s": _SECONDS, "run_s": _SECONDS})),
        "parameters": _PARAMS,
        "taken": listed(answer({**texts("field", "as"), "sent": ANY, "value": ANY})),
        "scheduler": maybe(_SCHEDULER),
        "prompts": maybe(_PROMPTS),
        "warnings": listed(TEXT),
    },
    {"draft": answer({"steps": INTEGER, "unet_calls": INTEGER, "cost": NUMBER})},
)
_ROW = {
    **texts("request_id", "created_at", "updated_at", "model_name"),
    "generation_url": maybe(TEXT),
    "credits_deduction": NUMBER,
    "latency_ms": maybe(INTEGER),
}
_GENERATION = answer(
    {
        **_ROW,
        **texts("id", "user_id", "status", "prompt"),
        "user_email": maybe(TEXT),
        "parameters": _PARAMS,
    }
)
_RECORD = answer(
    {
        **_ROW,
        "model_status": {"enum": list(segmind.STATES)},
        "request_body": _PARAMS,
        "error": maybe(TEXT),
    }
)


def _page(row: Schema) -> Schema:
    return answer({"data": listed(row), **dict.fromkeys(("page", "per_page", "total"), INTEGER)})


_WEBHOOK: dict[str, Schema] = {
    **texts("webhook_id", "webhook_url", "created_at"),
    "event": answer({"types": listed(TEXT)}),
    "is_active": FLAG,
}
_SENT = answer(
    {
        **texts("event_id", "request_id", "type"),
        "status": {"enum": list(webhooks.DISPATCH.values())},
        "attempts": INTEGER,
        "response_status": maybe(INTEGER),
        "error": maybe(TEXT),
        "created_at": TEXT,
        "next_attempt_at": maybe(TEXT),
    }
)
_MODEL_CARD = answer({**texts("id", "owned_by"), "object": {"const": "model"}, "created": INTEGER})
_OPENAI_IMAGE = {"anyOf": [answer(texts("url")), answer(texts("b64_json"))]}
_STATUS_WORD = answer(texts("status"))
_PROGRESS = answer(
    {
        **numbers("progress", "eta_relative"),
        "state": {"type": "object"},
        "current_image": maybe(TEXT),
        "textinfo": maybe(TEXT),
    }
)

#: Schemas of JSON answers with 200, by verb and path.
ANSWERS: dict[tuple[str, str], Schema] = {
    ("get", "/livez"): _STATUS_WORD,
    ("get", "/readyz"): answer({"status": TEXT, "workers": INTEGER}),
    ("get", "/v1/health"): _STATUS_WORD,
    ("get", "/v1/models"): answer({"models": listed({"type": "object", "required": ["slug"]})}),
    ("get", "/v1/schedulers"): answer(
        {"profile": TEXT, "steps": INTEGER, "schedulers": listed(_SCHEDULER)}
    ),
    ("get", "/v1/get-user-credits"): answer(numbers("credits", "free-credits")),
    ("get", "/v1/credits"): answer(
        {"data": answer({"credits": answer(numbers("remaining", "used"))})}
    ),
    ("get", "/api/auth/authenticate"): answer(
        {**texts("user_id", "name"), **numbers("credits", "credits_used")}
    ),
    ("post", "/v1/{slug}"): _IN_BASE64,
    ("post", "/v2/{slug}"): answer({**_OF_A_JOB, "poll_url": TEXT}, {"warnings": listed(TEXT)}),
    ("post", "/v2/{slug}/preflight"): _PREFLIGHT,
    ("get", "/v1/receipt-key"): answer(texts("algorithm", "key")),
    ("post", "/v2/replay"): answer(
        {
            "verdict": {"enum": ["identical", "different"]},
            "signed_here": FLAG,
            "differences": listed(answer({"field": TEXT, "receipt": ANY, "now": ANY})),
            "picture": answer({"receipt": _PIXELS, "now": _PIXELS}),
            "receipt": RECEIPT,
            **texts("request_id", "output"),
            "metrics": _METRICS,
        }
    ),
    ("get", "/v1/requests/{job_id}"): _JOB,
    ("get", "/v2/requests/{job_id}/status"): _JOB,
    ("get", "/v2/requests/{job_id}"): {"anyOf": [_RESULT, _JOB]},
    ("delete", "/v2/requests/{job_id}"): _JOB,
    ("post", "/v2/requests/{job_id}/finish"): _JOB,
    ("get", "/webhook/get"): answer({"webhooks": listed(answer(_WEBHOOK))}),
    ("post", "/webhook/add"): answer({**_WEBHOOK, "secret": TEXT}),
    ("post", "/webhook/update"): answer(_WEBHOOK),
    ("get", "/webhook/inactive"): answer({"webhook_id": TEXT, "is_active": FLAG}),
    ("get", "/webhook/dispatch-logs"): answer({"webhook_id": TEXT, "logs": listed(_SENT)}),
    ("get", "/inference-model-information/list"): answer(
        {segmind.LIST_KEY: listed({"type": "object", "required": ["slug", "parameters"]})}
    ),
    ("get", "/inference-request/recent-generations"): _page(_GENERATION),
    ("get", "/inference-request/generations"): _page(_GENERATION),
    ("get", "/inference-request/request-history"): _page(_RECORD),
    ("get", "/inference-request/request-history/{request_id}"): _RECORD,
    ("post", OPENAI): answer(
        {
            "data": listed(_OPENAI_IMAGE),
            **texts("output_format", "size", "request_id"),
            "created": INTEGER,
            "seed": INTEGER,
        }
    ),
    ("get", "/openai/v1/models"): answer(
        {"object": {"const": "list"}, "data": listed(_MODEL_CARD)}
    ),
    ("get", "/openai/v1/models/{slug}"): _MODEL_CARD,
    ("post", SDAPI): answer({"images": listed(TEXT), "parameters": _PARAMS, "info": TEXT}),
    ("get", "/sdapi/v1/samplers"): listed({"type": "object", "required": ["name"]}),
    ("get", "/sdapi/v1/schedulers"): listed(answer(texts("name", "label"))),
    ("get", "/sdapi/v1/scripts"): answer({"txt2img": listed(TEXT), "img2img": listed(TEXT)}),
    ("get", "/sdapi/v1/sd-models"): listed({"type": "object", "required": ["title"]}),
    ("get", "/sdapi/v1/loras"): listed({"type": "object", "required": ["name"]}),
    ("get", "/sdapi/v1/options"): answer(texts("sd_model_checkpoint", "samples_format")),
    ("get", "/sdapi/v1/progress"): _PROGRESS,
    ("get", "/openapi.json"): {"type": "object", "required": ["openapi", "paths"]},
}
