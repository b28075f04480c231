"""The texts of a request that moderation judges."""

from __future__ import annotations

from imaged.errors import BadParameter
from imaged.params.image_params import ImageParams
from imaged.params.loras import without_loras

MAX_TEXTS, MAX_CHARACTERS = 32, 100_000  # of a prompt that changes from step to step


def texts_to_judge(params: ImageParams) -> list[str]:
    """The prompt as sent, and what the text encoders get of it at each step and over all steps,
    with differently weighted pieces joined and apart.

    CPU-bound: call it in a thread. Raises BadParameter for a prompt that changes too often.
    """
    found, reading = [params.prompt], params.reading
    for name in ("prompt", "negative_prompt"):
        drawn = without_loras(getattr(params, name) or "")
        texts = dict.fromkeys(reading.texts(drawn, params.num_inference_steps))
        reading.check(drawn, name)
        many = len(texts) > MAX_TEXTS or sum(map(len, texts)) > MAX_CHARACTERS
        if many and len(texts) > 1:
            raise BadParameter(
                name,
                f"should say at most {MAX_TEXTS} different things over its steps, of "
                f"{MAX_CHARACTERS} characters in all",
            )
        if name == "prompt" or params.guidance_scale < 1:  # below 1 the negative prompt is drawn
            read = [reading.plain(t, between) for t in texts for between in ("", " ")]
            found += [drawn, *read, *([" then ".join(read)] if len(texts) > 1 else [])]
    return list(dict.fromkeys(found))
