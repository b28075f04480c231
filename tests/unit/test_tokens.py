"""Token ids are CLIP's own, and windows hold 75 of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaged.catalogue.model import MICRO
from imaged.errors import CheckpointRefused
from imaged.prompt.a1111 import spans
from imaged.prompt.tokenizer import Tokenizer
from imaged.prompt.windows import read_windows

START, END = 49406, 49407
FOLDERS = ("tokenizer", "tokenizer_2")
#: Ids as CLIP's published tokenizer gives them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "hello world": [3306, 1002],
}
HOSTILE = (
    *(
        "",
        " ",
        "\n\t\r\n",
        "\u00a0\u2003x\u3000y\u0085z\u2028",
        "\u180e\u200b\ufeff",
        "\0\x01\x1b[0m",
    ),
    *("I'm you're THEY'LL we'VE 'tis it''s '' 'S 's's", "don’t can't", "'", "!'s", "x'd'll"),
    *("!", "!!!", "wow!!! !a! ?!?", "a,b;c.d...", "__a_b__", "C++ (x:1.2) [y] {z} \\", "<|", "|>"),
    *("3.14 1234 ²³ ½ Ⅷ ٣٤ 一二三", "mp4 4k 2x2", "e\u0301 é \u212b Å ﬁ ﬀ", "\u0301\u0301", "Ǆ ǅ"),
    *(
        "İSTANBUL ß ẞ Σας ΣΑΣ",
        "ÀÉÎÕÜ",
        "ｆｕｌｌ Ｗｉｄｔｈ",
        "Ω\u2126 ©®™",
        "مرحبا بالعالم",
        "שָׁלוֹם",
    ),
    *("猫の写真", "안녕하세요", "\u1112\u1161\u11ab", "हिन्दी क्षि", "ภาษาไทย", "中文，没有空格。"),
    *("🐈", "👨‍👩‍👧‍👦🏳️‍🌈", "a🐈b🐈", "🇫🇷", "\U0010ffff\ue000\ufffe", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "z̷̢͝a̶l̸g̵o̷"),
    *(
        "<|endoftext|>",
        "<|startoftext|>",
        "a<|endoftext|>b",
        "<|ENDOFTEXT|>",
        "<|endoftext|",
        "<|x|>",
    ),
    *(
        "<|endoftext|><|startoftext|>!",
        "<|endoftext|>!<|EndOfText|>",
        "<|endoftext|></w>",
        "</w>a</w>",
    ),
    *("x" * 3000, "ab" * 500 + "1" * 50, "!" * 200, "supercalifragilisticexpialidocious", "#" * 9),
    *(
        "Ġ Ċ âĢ",
        "a" + "\u0300" * 50,
        "\u202etfel\u202c",
        "%20&amp;&#x27;",
        "cat-toy <cat-toy> <CAT-toy>",
    ),
)


@pytest.fixture(scope="module")
def ours() -> dict[str, Tokenizer]:
    return {name: Tokenizer(MICRO / name) for name in FOLDERS}


def reference(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return {name: reference(MICRO / name) for name in FOLDERS}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_transformers(
    name: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]
) -> None:
    own, other = ours[name], theirs[name]
    named = (other.bos_token_id, other.eos_token_id, other.pad_token_id)
    assert (own.start, own.end, own.pad) == named
    for text in HOSTILE:
        assert own.ids(text) == ids_of(other, text), text


ALPHABETS = st.text() | st.text("aàÉ's!<|>endoftext09 \n\u0301ñ猫🐈.,") | st.sampled_from(HOSTILE)


@given(text=st.lists(ALPHABETS, max_size=4).map("".join))
@settings(max_examples=300)
def test_ids_of_any_text_are_transformers(
    text: str, ours: dict[str, Tokenizer], theirs: dict[str, Any]
) -> None:
    for name in FOLDERS:
        assert ours[name].ids(text) == ids_of(theirs[name], text)


def copied(to: Path, name: str = "tokenizer_2", **files: Any) -> Path:
    """A copy of a tokenizer folder with some small files written anew, or absent for None."""
    folder = Path(shutil.copytree(MICRO / name, to))
    for stem, content in files.items():
        (folder / f"{stem}.json").unlink(missing_ok=True)
        if content is not None:
            (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


def told(content: str, **flags: bool) -> dict[str, Any]:
    """A token at length, as SDXL's own folders write it."""
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **plain, **flags}


START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
LONG = {"bos_token": told(START_TEXT), "eos_token": told(END_TEXT), "unk_token": told(END_TEXT)}
OBJECTS = {key: {"__type": "AddedToken", **token} for key, token in LONG.items()}
DECODER = {
    "0": told("!", normalized=False, special=True),
    "49406": told(START_TEXT, special=True),
    "49407": told(END_TEXT, special=True),
    "49408": told("<cat-toy>", normalized=False, special=False),
}
FORMS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "special_tokens_map": {**LONG, "pad_token": "!"},
        "tokenizer_config": {**OBJECTS, "pad_token": "!"},
    },
    "map_over_config": {"special_tokens_map": {"pad_token": told("!", rstrip=True)}},
    "config_alone": {
        "special_tokens_map": None,
        "tokenizer_config": {**OBJECTS, "pad_token": END_TEXT},
    },
    "neither": {"special_tokens_map": None, "tokenizer_config": None},
    "decoder": {"tokenizer_config": {**OBJECTS, "pad_token": "!", "added_tokens_decoder": DECODER}},
    "added": {"added_tokens": {"<cat-toy>": 49409, "my cat": 49408, "photo": 1125}},
}


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_every_form_give_transformers_ids(form: str, tmp_path: Path) -> None:
    """What stands in the small files decides how special tokens are found within texts."""
    folder = copied(tmp_path / "form", **FORMS[form])
    own, other = Tokenizer(folder), reference(folder)
    assert (own.start, own.end, own.pad) == (START, END, other.pad_token_id)
    for text in (*HOSTILE, "a photo, photographs", "MY \n cat"):
        assert own.ids(text) == ids_of(other, text), text


def test_one_file_that_holds_all_is_read(tmp_path: Path, theirs: dict[str, Any]) -> None:
    """Newer libraries save tokenizer.json in place of vocab.json and merges.txt."""
    folder, known = tmp_path / "whole", theirs["tokenizer_2"]
    reference(copied(tmp_path / "old", **FORMS["added"])).save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    own, other = Tokenizer(folder), reference(folder)
    assert (own.start, own.end, own.pad) == (START, END, 0)
    assert own.ids("<cat-toy>") == [49409]
    for text in HOSTILE:
        assert own.ids(text) == ids_of(other, text), text
        assert "<cat-toy>" in text.lower() or own.ids(text) == ids_of(known, text), text


def test_missing_and_damaged_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"the folder none lacks vocab\.json"):
        Tokenizer(tmp_path / "none")
    folder = copied(tmp_path / "tokenizer_2")
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    whole = {path: path.read_bytes() for path in (vocabulary, merges)}
    lines = whole[merges].splitlines(keepends=True)
    for path, content, said in (
        (vocabulary, whole[vocabulary][:5000], "does not hold a tokenizer of CLIP's kind"),
        (vocabulary, b"\xff\xfe", "does not hold a tokenizer"),
        (vocabulary, b"{}", "does not hold a tokenizer"),
        (vocabulary, b"[1]", "does not hold a tokenizer"),
        (vocabulary, whole[vocabulary].replace(b"<|startoftext|>", b"<s>"), "has no token <|start"),
        (merges, b"".join(lines[:-1]), "lacks merges"),
        (merges, b"", "lacks merges"),
        (merges, whole[merges] + b"one", "does not hold a tokenizer"),
        (merges, whole[merges] + b"q\xc4\x80 zq\n", "does not hold a tokenizer"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointRefused, match=f"the folder tokenizer_2 {said}"):
            Tokenizer(folder)
        path.write_bytes(whole[path])
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointRefused, match=r"tokenizer_config\.json is not an object"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    merges.unlink()
    with pytest.raises(CheckpointRefused, match=r"the folder tokenizer_2 lacks merges\.txt"):
        Tokenizer(folder)


def test_ids_are_clips(ours: dict[str, Tokenizer]) -> None:
    for text, ids in KNOWN.items():
        for tokenizer in ours.values():
            window = read_windows(spans(text), tokenizer).ids[0]
            assert list(window[: len(ids) + 2]) == [START, *ids, END]
            assert len(window) == 77


def test_padding_differs_between_the_encoders(ours: dict[str, Tokenizer]) -> None:
    assert read_windows(spans("x"), ours["tokenizer"]).ids[0][-1] == END
    assert read_windows(spans("x"), ours["tokenizer_2"]).ids[0][-1] == 0


def test_long_prompts_fill_several_windows(ours: dict[str, Tokenizer]) -> None:
    for words, count in ((1, 1), (75, 1), (76, 2), (150, 2), (151, 3)):
        windows = read_windows(spans("cat " * words), ours["tokenizer"])
        assert len(windows.ids) == len(windows.weights) == count
    assert len(read_windows(spans(""), ours["tokenizer"]).ids) == 1


def test_a_window_ends_at_a_comma_if_one_is_near(ours: dict[str, Tokenizer]) -> None:
    """Lengths of the windows; a word is a token, and so is a comma."""

    def lengths(text: str) -> list[int]:
        windows = read_windows(spans(text), ours["tokenizer"])
        return [ids.index(END, 1) - 1 for ids in windows.ids]

    assert lengths("cat " * 70 + ", " + "dog " * 20) == [71, 20]
    assert lengths("cat " * 55 + ", " + "dog " * 20) == [56, 20]
    assert lengths("cat " * 54 + ", " + "dog " * 21) == [75, 1]  # 21 from the end
    assert lengths("cat " * 74 + ", dog") == [75, 1]
    assert lengths("cat " * 75 + ", dog") == [75, 2]  # begins with the comma
    assert lengths(("cat " * 9 + ", ") * 15) == [70, 70, 10]


def test_break_ends_a_window(ours: dict[str, Tokenizer]) -> None:
    def words(text: str) -> list[int]:
        windows = read_windows(spans(text), ours["tokenizer"])
        return [ids.index(END, 1) - 1 for ids in windows.ids]

    assert words("a cat BREAK a red dog") == [2, 3]
    assert words("(a cat BREAK dog:1.2) BREAK") == [2, 1]
    assert words("BREAK cat") == [0, 1]
    assert words("cat BREAK BREAK dog") == [1, 0, 1]
    assert len(words("break, breaks, BREAKS")) == 1


def test_weights_stand_with_their_tokens(ours: dict[str, Tokenizer]) -> None:
    windows = read_windows(spans("a (cat:1.5) here"), ours["tokenizer"])
    assert windows.weights[0][:6] == (1.0, 1.0, 1.5, 1.0, 1.0, 1.0)
    assert windows.ids[0][2] == 2368
