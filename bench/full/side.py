"""One side of `full` in a process of its own: outputs into a file, what was found as JSON.

python -m bench.full.side theirs FOLDER OUT
python -m bench.full.side ours CHECKPOINT OUT FOLDER THEIRS
python -m bench.full.side load CHECKPOINT -
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.full.command import library_nets
from imaged.engine.loading.load import NETS, Nets, load

CPU = torch.device("cpu")
CELLS, TIME, END = 64, 500.0, 49407  # a latent's side, one timestep, the id behind a text
SIZES = torch.tensor([512.0, 512, 0, 0, 512, 512])
Outputs = dict[str, torch.Tensor]


def given(context: int, pooled: int) -> Outputs:
    """The same inputs on both sides."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, END - 1, (1, 77), generator=generator)
    ids[0, 30:] = END
    drawn = {
        "x": torch.randn(2, 4, CELLS, CELLS, generator=generator),
        "context": torch.randn(2, 77, context, generator=generator),
        "pooled": torch.randn(pooled, generator=generator),
        "z": torch.randn(1, 4, CELLS, CELLS, generator=generator),
    }
    return drawn | {"ids": ids}


@torch.inference_mode()
def ours(nets: Nets) -> Outputs:
    unet = nets.unet
    inputs = given(unet.config.cross_attention_dim, nets.text_encoder_2.config.projection_dim)
    first, _ = nets.text_encoder(inputs["ids"], END)
    second, pooled = nets.text_encoder_2(inputs["ids"], END)
    assert pooled is not None
    embedded = unet.embed(torch.tensor([TIME, TIME]), inputs["pooled"], SIZES)
    out = unet(
        inputs["x"],
        iter([block.time_emb_proj(embedded) for block in unet.resnets()]),
        iter([attention.keys_values(inputs["context"]) for attention in unet.cross_attentions()]),
    )
    return _named(first, second, pooled, out, nets.vae(inputs["z"]))


@torch.inference_mode()
def theirs(nets: dict[str, Any]) -> tuple[Outputs, dict[str, float]]:
    """Outputs, and the seconds that the two large ones took."""
    unet, two = nets["unet"], nets["text_encoder_2"]
    inputs = given(unet.config.cross_attention_dim, two.config.projection_dim)
    first = nets["text_encoder"](inputs["ids"], output_hidden_states=True)
    second = two(inputs["ids"], output_hidden_states=True)
    added = {
        "text_embeds": inputs["pooled"].expand(2, -1),
        "time_ids": SIZES.expand(2, -1),
    }
    started = time.perf_counter()
    out = unet(
        inputs["x"],
        torch.tensor(TIME),
        encoder_hidden_states=inputs["context"],
        added_cond_kwargs=added,
    ).sample
    between = time.perf_counter()
    decoded = nets["vae"].decode(inputs["z"]).sample
    took = {
        "UNet call of two rows at 512 px": between - started,
        "VAE decode at 512 px": time.perf_counter() - between,
    }
    outputs = _named(
        first.hidden_states[-2], second.hidden_states[-2], second.text_embeds, out, decoded
    )
    return outputs, took


def _named(*outputs: torch.Tensor) -> Outputs:
    names = ("first text encoder", "second text encoder", "pooled text", "UNet call", "VAE decode")
    return {name: out.contiguous() for name, out in zip(names, outputs, strict=True)}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def unequal(nets: Nets, folder: Path) -> tuple[int, int]:
    """(how many tensors differ from the folder's, how many there are)."""
    different = count = 0
    for part in NETS:
        state = getattr(nets, part).state_dict()
        before = count
        for path in sorted((folder / part).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    name = key.removeprefix("text_model.")
                    if name in state:
                        count += 1
                        wanted = file.get_tensor(key).to(state[name].dtype)
                        different += not torch.equal(state[name], wanted)
        different += len(state) - (count - before)
    return different, count


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Bytes that this process comes to hold beside what it held before and what it can drop."""
    found, stop = {"peak": 0}, threading.Event()
    before = _anonymous()

    def watch() -> None:
        while not stop.wait(0.02):
            found["peak"] = max(found["peak"], _anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _anonymous() -> int:
    """Bytes of this process that no file holds: pages of a mapped file can be dropped any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def main(side: str, layout: Path, out: Path, *more: str) -> dict[str, Any]:
    if side == "theirs":
        nets = library_nets(layout, torch.float32)
        outputs, took = theirs(nets)
        save_file(outputs, out)
        return took
    with peak_memory() as memory:
        started = time.perf_counter()
        loaded = load(layout, CPU)
        seconds = time.perf_counter() - started
    if side == "load":
        parts = [getattr(loaded, part) for part in NETS]
        weights = sum(p.nbytes for part in parts for p in part.parameters())
        return {"seconds": seconds, "peak": memory["peak"], "weights": weights}
    folder, reference = map(Path, more)
    different, count = unequal(loaded, folder)
    wanted = load_file(reference)
    found = {name: apart(value, wanted[name]) for name, value in ours(loaded).items()}
    return {"unequal": different, "tensors": count, "apart": found}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])))
