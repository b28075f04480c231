"""Token ids are CLIP's own, and windows hold 75 of them."""

from typing import Any

from imaged.engine.prompt.tokens import read_windows

START, END = 49406, 49407
#: Ids as CLIP's published tokenizer gives them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "hello world": [3306, 1002],
}


def test_ids_are_clips(nets: Any) -> None:
    for text, ids in KNOWN.items():
        for tokenizer in (nets.tokenizer, nets.tokenizer_2):
            window = read_windows(text, tokenizer).ids[0]
            assert list(window[: len(ids) + 2]) == [START, *ids, END]
            assert len(window) == 77


def test_padding_differs_between_the_encoders(nets: Any) -> None:
    assert read_windows("x", nets.tokenizer).ids[0][-1] == END
    assert read_windows("x", nets.tokenizer_2).ids[0][-1] == 0


def test_long_prompts_fill_several_windows(nets: Any) -> None:
    for words, count in ((1, 1), (75, 1), (76, 2), (150, 2), (151, 3)):
        windows = read_windows("cat " * words, nets.tokenizer)
        assert len(windows.ids) == len(windows.weights) == count
    assert len(read_windows("", nets.tokenizer).ids) == 1


def test_weights_stand_with_their_tokens(nets: Any) -> None:
    windows = read_windows("a (cat:1.5) here", nets.tokenizer)
    assert windows.weights[0][:6] == (1.0, 1.0, 1.5, 1.0, 1.0, 1.0)
    assert windows.ids[0][2] == 2368
