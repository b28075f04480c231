"""Each of our nets against the reference libraries' own, with the same weights.

Two checkpoints: the shipped one, and SDXL's full structure at reduced width with random weights,
which enlarge rounding. Tolerance: what theirs are off by, see tests/tolerance.py; on the shipped
checkpoint text encoders and VAE were equal to the bit, the UNet to 3e-7 of the largest output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from imaged.catalogue.model import MICRO
from imaged.engine.loading.load import NETS, Nets, assemble
from imaged.errors import CheckpointRefused
from tests.golden.conftest import reduced_nets
from tests.tolerance import difference, in_float64, rounding
from training.micro.parts.assembled import told

CPU, FLOAT = torch.device("cpu"), torch.float32
END = 49407


def ours_of(their_nets: dict[str, Any], **changed: Any) -> Nets:
    """Our nets with the weights of theirs; `changed` values of the UNet's config."""
    parts = {name: (told(net), net.state_dict()) for name, net in their_nets.items()}
    parts["unet"][0].update(changed)
    return assemble(parts, tokenizers=MICRO, device=CPU, dtype=FLOAT)


@pytest.fixture(scope="module", params=["shipped", "reduced"])
def pair(request: pytest.FixtureRequest) -> tuple[Nets, dict[str, Any]]:
    if request.param == "shipped":
        pipeline = request.getfixturevalue("theirs")
        their_nets = {part: getattr(pipeline, part) for part in NETS}
    else:
        their_nets = {name: net.eval() for name, net in reduced_nets().items()}
        for part in ("unet", "vae"):
            their_nets[part].to(memory_format=torch.channels_last)  # as ours are
    return ours_of(their_nets), their_nets


@torch.inference_mode()
def unet_outputs(ours: Nets, unet: Any, height: int, width: int) -> tuple[Any, Any, float]:
    """Ours, theirs, and how far apart they may be."""
    generator = torch.Generator().manual_seed(1)
    config = ours.unet.config
    x = torch.randn(2, 4, height, width, generator=generator)
    context = torch.randn(2, 154, config.cross_attention_dim, generator=generator)
    pooled_width = ours.text_encoder_2.config.projection_dim
    pooled = torch.randn(pooled_width, generator=generator)
    time, sizes = torch.tensor([999.0, 17.5]), torch.tensor([1152, 896, 0, 0, 1152, 896.0])
    embedded = ours.unet.embed(time, pooled, sizes)
    mine = ours.unet(
        x,
        iter([block.time_emb_proj(embedded) for block in ours.unet.resnets()]),
        iter([attention.keys_values(context) for attention in ours.unet.cross_attentions()]),
    )

    def out(dtype: torch.dtype) -> torch.Tensor:
        rows = {"text_embeds": pooled.expand(2, -1), "time_ids": sizes.expand(2, -1)}
        added = {name: value.to(dtype) for name, value in rows.items()}
        sample: torch.Tensor = unet(
            x.to(dtype), time, encoder_hidden_states=context.to(dtype), added_cond_kwargs=added
        ).sample
        return sample

    with in_float64(unet):
        exact = out(torch.float64)
    theirs = out(FLOAT)
    return mine, theirs, rounding(theirs, exact)


@pytest.mark.parametrize("size", [(16, 24), (17, 13)], ids=str)
def test_unet(pair: tuple[Nets, dict[str, Any]], size: tuple[int, int]) -> None:
    ours, theirs, bound = unet_outputs(pair[0], pair[1]["unet"], *size)
    assert difference(ours, theirs) <= bound


@torch.inference_mode()
def test_decoder(pair: tuple[Nets, dict[str, Any]]) -> None:
    ours, vae = pair[0], pair[1]["vae"]
    z = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(2))
    with in_float64(vae):
        exact = vae.decode(z.double()).sample
    theirs = vae.decode(z).sample
    assert difference(ours.vae(z), theirs) <= rounding(theirs, exact)


@torch.inference_mode()
def test_text_encoders(pair: tuple[Nets, dict[str, Any]]) -> None:
    """Windows that end early, in the middle and nowhere but at the end."""
    ours, theirs = pair
    ids = torch.randint(0, END - 1, (3, 77), generator=torch.Generator().manual_seed(3))
    ids[0, 5:], ids[1, 40:], ids[2, 76] = END, END, END
    for part in ("text_encoder", "text_encoder_2"):
        vectors, pooled = getattr(ours, part)(ids, END)
        with in_float64(theirs[part]):
            exact = theirs[part](ids, output_hidden_states=True)
        out = theirs[part](ids, output_hidden_states=True)
        layer, wide = out.hidden_states[-2], exact.hidden_states[-2]
        assert difference(vectors, layer) <= rounding(layer, wide)
        assert (pooled is None) == (part == "text_encoder")
        if pooled is not None:
            bound = rounding(out.text_embeds, exact.text_embeds)
            assert difference(pooled, out.text_embeds) <= bound


def test_a_wrong_number_of_heads_is_seen() -> None:
    """The mutant: weights of the same shapes, read in another way."""
    reduced = {name: net.eval() for name, net in reduced_nets().items()}
    ours = ours_of(reduced, attention_head_dim=[1, 2, 4])
    mine, theirs, bound = unet_outputs(ours, reduced["unet"], 16, 16)
    assert difference(mine, theirs) > 100 * bound


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"act_fn": "gelu"}, "unet: act_fn is 'gelu'; SDXL's is 'silu'"),
        ({"use_linear_projection": False}, "use_linear_projection is False"),
        ({"addition_embed_type": None}, "addition_embed_type is None"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "other blocks than SDXL's"),
        ({"block_out_channels": [64, 128]}, "not as many block_out_channels"),
        ({"cross_attention_dim": None}, "its config has no cross_attention_dim"),
        ({"cross_attention_dim": 64}, "two text encoders"),
        ({"addition_time_embed_dim": 128}, "two text encoders"),
        ({"block_out_channels": [32, 128, 128]}, "has the shape"),
        ({"layers_per_block": 3}, r"unet: it lacks \d+ weights"),
        ({"layers_per_block": 1}, r"unet: it does not know \d+ weights"),
    ],
    ids=str,
)
def test_what_would_be_read_wrong_is_refused(
    source: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointRefused, match=said):
        ours_of(source, **changed)


@pytest.mark.slow
def test_neither_library_is_imported_by_a_worker_that_has_loaded() -> None:
    """They take seconds, and so does torch's compiler; nobody would notice one that creeps in."""
    import subprocess
    import sys

    program = (
        "import sys, imaged.worker.main; from imaged.catalogue.model import MICRO;"
        "from imaged.engine.engine import Engine; from imaged.engine.loading.load import load;"
        "from imaged.params.image_params import ImageParams; engine = Engine(load(MICRO));"
        "engine.submit('x', ImageParams('a house', seed=1, img_width=128, img_height=128));"
        "engine.tick(); engine.close();"
        "print(sorted({'diffusers', 'transformers', 'scipy', 'torch._dynamo'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.slow
def test_a_picture_without_a_server_waits_for_no_server_to_be_imported(tmp_path: Path) -> None:
    """The store, its migrations and HTTP clients took a third of the imports beside torch."""
    import subprocess
    import sys

    program = (
        "import sys; from imaged.cli import main;"
        "words = 'generate x --steps 20 --width 512 --height 512 --data none -o x.png';"
        "main(words.split(), standalone_mode=False);"
        "print(sorted({'sqlalchemy', 'alembic', 'httpx', 'starlette'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
