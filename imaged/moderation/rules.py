"""Prompt rules: a built-in class that is always refused, and the operator's own list.

They match words, not meaning: what they let through need not be safe. Negative prompts name what to
avoid, so they are judged only at a guidance below 1, where they are drawn.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import regex

from imaged.errors import BadParameter, CommandError
from imaged.moderation import minors, normalize
from imaged.params.image_params import ImageParams
from imaged.settings import Settings

log = logging.getLogger(__name__)

REASON, REFUSAL = "content_policy", "The prompt was refused by the content policy."
HARD = "the hard class"
MAX_RULES, MAX_RULE_LENGTH, MAX_FILE_BYTES = 10_000, 1_000, 1_000_000
MAX_TEXTS, MAX_CHARACTERS = 32, 100_000  # of a prompt that changes from step to step
PATTERNS_S = 0.5  # for all patterns of a prompt; a pattern that takes longer refuses
UNSPACED = "\u2e80"  # code points from here on: scripts without spaces between words


@dataclass(frozen=True)
class Rule:
    """One line of the operator's file: a phrase or a pattern."""

    name: str
    text: str
    pattern: regex.Pattern[str] | None = None


@dataclass(frozen=True)
class Rules:
    """The built-in class, and the operator's rules if any."""

    listed: tuple[Rule, ...] = ()

    @classmethod
    def load(cls, path: str) -> Rules:
        """The rules of a file; an empty path gives the built-in class alone.

        One rule per line: a phrase or a /regular expression/; empty lines and # comments are
        skipped. Raises CommandError with file and line.
        """
        if not path:
            return cls()
        try:
            content = Path(path).read_bytes()
            lines = content[: MAX_FILE_BYTES + 1].decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"IMAGED_RULES: {path} cannot be read: {error}") from None
        numbered = [(n, line.strip()) for n, line in enumerate(lines, 1)]
        kept = [(n, line) for n, line in numbered if line and not line.startswith("#")]
        if len(content) > MAX_FILE_BYTES or len(kept) > MAX_RULES:
            raise CommandError(
                f"IMAGED_RULES: {path} should have at most {MAX_RULES} rules and "
                f"{MAX_FILE_BYTES} bytes"
            )
        return cls(tuple(_read_rule(line, f"{path}:{n}") for n, line in kept))

    def refuses(self, params: ImageParams) -> bool:
        """Whether a rule refuses the prompts of a request; the log names the rule, never the
        prompt. CPU-bound: call it in a thread. Raises BadParameter for a prompt that changes too
        often.
        """
        rule = next(filter(None, map(self.judge, texts_to_judge(params))), None)
        if rule:
            log.info("a prompt was refused by %s", rule)
        return rule is not None

    def judge(self, prompt: str) -> str | None:
        """The name of the rule that refuses this text, or None. CPU-bound."""
        folded = normalize.fold(prompt)
        variants = normalize.normalized_variants(folded)
        if minors.involves_minors_sexually(variants):
            return HARD
        deadline = time.monotonic() + PATTERNS_S
        seen = prompt, folded
        return next((r.name for r in self.listed if _matches(r, seen, variants, deadline)), None)


def texts_to_judge(params: ImageParams) -> list[str]:
    """The prompt as sent, and what the text encoders get of it at each step and over all steps,
    with differently weighted pieces joined and apart.

    CPU-bound: call it in a thread. Raises BadParameter for a prompt that changes too often.
    """
    found = [params.prompt]
    for name, prompt in zip(("prompt", "negative_prompt"), params.prompts, strict=True):
        if prompt is None:
            continue
        texts = dict.fromkeys(prompt.by_step)
        prompt.check(name)
        many = len(texts) > MAX_TEXTS or sum(map(len, texts)) > MAX_CHARACTERS
        if many and len(texts) > 1:
            raise BadParameter(
                name,
                f"should say at most {MAX_TEXTS} different things over its steps, of "
                f"{MAX_CHARACTERS} characters in all",
            )
        if name == "prompt" or params.guidance_scale < 1:  # below 1 the negative prompt is drawn
            read = [prompt.plain(t, between) for t in texts for between in ("", " ")]
            found += [prompt.text, *read, *([" then ".join(read)] if len(texts) > 1 else [])]
    return list(dict.fromkeys(found))


def statement(settings: Settings) -> str:
    """The rules in use, for the header x-safety of every answer; see present.headers.safety_header
    for the image checker's entry.
    """
    return f"prompt-rules={'hard+operator' if settings.rules else 'hard'}"


def _read_rule(line: str, name: str) -> Rule:
    if len(line) > MAX_RULE_LENGTH:
        raise CommandError(f"{name}: a rule should have at most {MAX_RULE_LENGTH} characters")
    if len(line) > 1 and line.startswith("/") and line.endswith("/"):
        return Rule(name, "", _compile(line[1:-1], name))
    folded = normalize.fold(line)
    text = folded.strip() if max(folded, default="") >= UNSPACED else normalize.words(folded)
    if not text.strip():
        raise CommandError(f"{name}: a rule should have at least one letter or digit")
    return Rule(name, text)


def _compile(text: str, name: str) -> regex.Pattern[str]:
    try:
        pattern = regex.compile(text, regex.IGNORECASE)
        matches_all = pattern.search("", timeout=PATTERNS_S) is not None
    except (regex.error, TimeoutError, RecursionError) as error:
        raise CommandError(f"{name}: this is no regular expression: {error}") from None
    if matches_all:
        raise CommandError(f"{name}: this expression matches every prompt, also an empty one")
    return pattern


def _matches(rule: Rule, texts: tuple[str, str], variants: list[str], deadline: float) -> bool:
    """texts: the prompt as it stands, for patterns with accents or other alphabets, and folded."""
    if rule.pattern is None:
        return any(rule.text in text for text in (texts[1], *variants))
    try:
        return any(
            rule.pattern.search(text, timeout=max(0.001, deadline - time.monotonic()))
            for text in texts
        )
    except TimeoutError:
        log.warning("%s: the expression took too long on a prompt, which is refused", rule.name)
        return True
