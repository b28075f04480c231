"""Which prompts are refused: a hard class that is always on, and the operator's own list.

A pure function over text. It catches words, not meaning: what it lets through is not thereby
safe. The negative prompt is not judged, for to name what to avoid is not to ask for it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import regex

from imaged.errors import CommandError
from imaged.moderation import minors, normalize
from imaged.settings import Settings

log = logging.getLogger(__name__)

REASON, REFUSAL = "content_policy", "The prompt was refused by the content policy."
HARD = "the hard class"
MOST_RULES, LONGEST_RULE, LARGEST_FILE = 10_000, 1_000, 1_000_000
PATTERNS_S = 0.5  # for all patterns of one prompt; a pattern that cannot decide in time refuses
UNSPACED = "\u2e80"  # from here on scripts that write words without spaces between them


@dataclass(frozen=True)
class Rule:
    """One line of the operator's file: words that stand side by side, or a pattern."""

    name: str
    text: str
    pattern: regex.Pattern[str] | None = None


@dataclass(frozen=True)
class Rules:
    """The hard class and an operator's rules; `Rules()` is the hard class alone."""

    listed: tuple[Rule, ...] = ()

    @classmethod
    def load(cls, path: str) -> Rules:
        """The rules of a file, or the hard class alone if the path is empty.

        One rule a line: words, or a /regular expression/; empty lines and lines that begin with
        # are left out. Raises CommandError with the file and the line.
        """
        if not path:
            return cls()
        try:
            content = Path(path).read_bytes()
            lines = content[: LARGEST_FILE + 1].decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"IMAGED_RULES: {path} cannot be read: {error}") from None
        numbered = [(n, line.strip()) for n, line in enumerate(lines, 1)]
        kept = [(n, line) for n, line in numbered if line and not line.startswith("#")]
        if len(content) > LARGEST_FILE or len(kept) > MOST_RULES:
            raise CommandError(
                f"IMAGED_RULES: {path} should have at most {MOST_RULES} rules and "
                f"{LARGEST_FILE} bytes"
            )
        return cls(tuple(_read_rule(line, f"{path}:{n}") for n, line in kept))

    def judge(self, prompt: str) -> str | None:
        """The name of a rule that refuses this prompt, or None. Takes time: use a thread."""
        folded = normalize.fold(prompt)
        variants = normalize.normalized_variants(folded)
        if minors.involves_minors_sexually(variants):
            return HARD
        deadline = time.monotonic() + PATTERNS_S
        return next((r.name for r in self.listed if _meets(r, folded, variants, deadline)), None)


def statement(settings: Settings) -> str:
    """Which rules every prompt goes through here, for the header x-safety; what looked at a job's
    pictures is said of that job (`replies.checked`).
    """
    return f"prompt-rules={'hard+operator' if settings.rules else 'hard'}"


def _read_rule(line: str, name: str) -> Rule:
    if len(line) > LONGEST_RULE:
        raise CommandError(f"{name}: a rule should have at most {LONGEST_RULE} characters")
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


def _meets(rule: Rule, folded: str, variants: list[str], deadline: float) -> bool:
    if rule.pattern is None:
        return rule.text in folded or any(rule.text in variant for variant in variants)
    try:
        left_s = max(0.001, deadline - time.monotonic())
        return rule.pattern.search(folded, timeout=left_s) is not None
    except TimeoutError:
        log.warning("%s: the expression took too long on a prompt, which is refused", rule.name)
        return True
