"""Text to the token ids of CLIP's vocabulary, from a tokenizer folder in the diffusers layout.

A folder holds either vocab.json and merges.txt or, as newer libraries save it, tokenizer.json;
small files beside them name the special tokens. The steps are those of CLIP's published tokenizer:
tests/unit/test_tokens.py holds the ids against another implementation's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from imaged.errors import CheckpointRefused

START, END = "<|startoftext|>", "<|endoftext|>"
NAMED = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
WORD_END = "</w>"
BYTES = 2 * 256  # entries that no merge makes: every byte, within a word and at its end
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of tokens beside the vocabulary's own
#: A word of CLIP's: a special token, an English ending, letters, one digit or a run of the rest.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

_BYTES = decoders.ByteLevel()


class Tokenizer:
    """One vocabulary; raises CheckpointRefused with what is wrong with its files.

    start, end, pad: ids of the tokens before a text, after it and after the end.
    """

    def __init__(self, folder: Path) -> None:
        try:
            whole, config = _json(folder / "tokenizer.json"), _config(folder)
            named = {key: _text(config.get(key) or text) for key, text in NAMED.items()}
            model, merges = _model(folder, whole, named["unk_token"])
            self._backend = _pipeline(model)
            added = _added(folder, whole, config)
            self._backend.add_tokens(added)
            self.start, self.end, _, self.pad = (self._known(text) for text in named.values())
            # Those that are not among the added are found within texts all the same.
            self._backend.add_tokens([_token(config.get(key) or NAMED[key]) for key in NAMED])
        except CheckpointRefused as error:
            raise CheckpointRefused(f"the folder {folder.name} {error.detail}") from error
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointRefused(
                f"the folder {folder.name} does not hold a tokenizer of CLIP's kind: {error}"
            ) from error
        unmade = {text for text in (*named.values(), *map(str, added)) if len(text) > 1}
        if self._backend.get_vocab_size(with_added_tokens=False) > BYTES + merges + len(unmade):
            raise CheckpointRefused(f"the folder {folder.name} lacks merges: the file was cut")

    def ids(self, text: str) -> list[int]:
        """The text's ids, without start and end."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def text(self, id: int) -> str:
        """A token as its vocabulary writes it, </w> where a word ends; where it is not text by
        itself, how many bytes of a character it stands for.
        """
        token = str(self._backend.id_to_token(id))
        bare = token.removesuffix(WORD_END)
        read = str(_BYTES.decode([bare]))
        shown = f"<{len(bare)} byte{'s' * (len(bare) > 1)}>" if "\ufffd" in read else read
        return shown + token[len(bare) :]

    def _known(self, text: str) -> int:
        found = self._backend.token_to_id(text)
        if found is None:
            raise CheckpointRefused(f"has no token {text} in its vocabulary")
        return int(found)


def _pipeline(model: BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


def _model(folder: Path, whole: Mapping[str, Any], unknown: str) -> tuple[BPE, int]:
    """The merging of bytes into tokens, and how many merges there are."""
    if whole:
        model = whole["model"]
        lines = (m if isinstance(m, str) else " ".join(m) for m in model["merges"])
        return _merging(json.dumps(model["vocab"]), "\n".join(lines), unknown)
    texts: list[str] = []
    for path in (folder / "vocab.json", folder / "merges.txt"):
        if not path.is_file():
            raise CheckpointRefused(f"lacks {path.name}")
        texts.append(path.read_text("utf-8"))
    return _merging(texts[0], texts[1], unknown)


@lru_cache(maxsize=1)  # SDXL's two tokenizers, and those of all checkpoints, mostly have the same
def _merging(vocabulary: str, merges: str, unknown: str) -> tuple[BPE, int]:
    """From the texts of vocab.json and merges.txt."""
    lines = (line for line in merges.split("\n") if line and not line.startswith("#version"))
    pairs = [(left, right) for left, right in map(str.split, lines)]
    model = BPE(json.loads(vocabulary), pairs, unk_token=unknown, end_of_word_suffix=WORD_END)
    return model, len(pairs)


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; without a list of added tokens the older special_tokens_map.json
    overrides it.
    """
    config = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _json(folder / "special_tokens_map.json")
    return config


def _added(folder: Path, whole: Mapping[str, Any], config: Mapping[str, Any]) -> list[AddedToken]:
    """Tokens that are found before the text is cut into words, in the order of their ids."""
    found: dict[int, Any] = {}
    if "added_tokens_decoder" in config:
        found = {int(key): token for key, token in config["added_tokens_decoder"].items()}
    else:
        named = {_text(config[key]) for key in NAMED if config.get(key)}
        for text, key in _json(folder / "added_tokens.json").items():
            found[key] = {"content": text, "normalized": text not in named}
        found |= {token["id"]: token for token in whole.get("added_tokens", ())}
    return [_token(found[key]) for key in sorted(found)]


def _token(said: str | Mapping[str, Any]) -> AddedToken:
    """A token from its entry in the small files: its text, or its text and how it is matched."""
    if isinstance(said, str):
        return AddedToken(said, normalized=False)
    return AddedToken(said["content"], **{flag: said[flag] for flag in FLAGS if flag in said})


def _text(said: str | Mapping[str, Any]) -> str:
    return said if isinstance(said, str) else str(said["content"])


def _json(path: Path) -> dict[str, Any]:
    """What a file says, nothing if there is none."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not an object")
    return content
