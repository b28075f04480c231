"""Write CLIP's tokenizer files from the merges list inside the `open_clip_torch` wheel.

    python -m training.micro.tokenizer path/to/bpe_simple_vocab_16e6.txt.gz

The vocabulary follows from the merges: 256 byte symbols, the same at the end of a word, one
entry for each merge, and the two special tokens. Both tokenizers share it; the first pads with
the end token, the second with "!", as SDXL does.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import click

from training.micro.architecture import CHECKPOINT

MERGES = 49152 - 256 - 2


def byte_symbols() -> list[str]:
    """The printable stand-ins for the 256 bytes: printable ones first, the others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def write(folder: Path, merges: list[str], pad: str) -> None:
    """vocab.json, merges.txt and the two small configs that the tokenizer class reads."""
    symbols = byte_symbols()
    words = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *(m.replace(" ", "") for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert len(words) == 49408
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(
        json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), "utf-8"
    )
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")


@click.command(help=__doc__)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=CHECKPOINT, show_default=True)
def main(source: Path, out: Path) -> None:
    merges = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    write(out / "tokenizer", merges, pad="<|endoftext|>")
    write(out / "tokenizer_2", merges, pad="!")


if __name__ == "__main__":
    main()
