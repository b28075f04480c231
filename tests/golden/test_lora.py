"""LoRA against diffusers' own loading of the same files, on SDXL's structure at reduced width.

Reference: StableDiffusionXLPipeline.load_lora_weights and set_adapters (peft). Tolerance: what
rounding makes of the reference itself, see tests/tolerance.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from bench.sides import original_layout
from imaged.engine.engine import Engine
from imaged.engine.loading.load import Nets, load
from imaged.engine.loading.lora import NO_LORAS, Loras, read_lora
from imaged.engine.loading.single_file import diffusers_name
from imaged.engine.nets.layers import Conv2d, Layer
from imaged.errors import CheckpointRefused, JobFailed
from imaged.params.image_params import ImageParams
from imaged.prompt import Lora, Prompt
from tests.golden.test_checkpoints import CPU
from tests.golden.test_parity import our_latents
from tests.mutants import red
from tests.oracle import build_scheduler
from tests.tolerance import difference, summed, with_bound

RANK, ALPHA = 4, 2.0
JOB = ImageParams("a house", num_inference_steps=6, seed=3, img_width=128, img_height=128)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def nets(folder: Path) -> Nets:
    return load(folder, CPU)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for net in (pipeline.unet, pipeline.vae):
        net.to(memory_format=torch.channels_last)
    return pipeline


def layers(nets: Nets) -> dict[tuple[str, str], Layer]:
    """Every layer that a LoRA may change, by part and dotted name."""
    parts = ("unet", "text_encoder", "text_encoder_2")
    return {
        (part, name): layer
        for part in parts
        for name, layer in getattr(nets, part).named_modules()
        if isinstance(layer, Layer) and hasattr(layer, "weight")
    }


def attention(nets: Nets) -> dict[tuple[str, str], Layer]:
    """What most files change: attention and feed-forward layers.

    Not the embeddings of time and sizes, whose names with underscores the reference misreads.
    """
    return {
        place: layer
        for place, layer in layers(nets).items()
        if not isinstance(layer, Conv2d) and not re.search("time|add_embedding", place[1])
    }


def halves(chosen: Mapping[tuple[str, str], Layer], seed: int) -> dict[tuple[str, str], Any]:
    """Random halves for each layer, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, layer in chosen.items():
        weight: Any = layer.weight
        outputs, inputs = weight.shape[:2]
        kernel = weight.shape[2:]
        down = torch.randn(RANK, inputs, *kernel, generator=generator) / (inputs**0.5)
        up = torch.randn(outputs, RANK, *(1,) * len(kernel), generator=generator) / 8
        found[place] = (down, up)
    return found


PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def kohya(drawn: Mapping[tuple[str, str], Any]) -> Tensors:
    """Underscores, with alpha; text encoders as in the libraries' own nets."""
    tensors = {}
    for (part, name), (down, up) in drawn.items():
        inner = name if part == "unet" else f"text_model.{name}"
        key = PREFIX[part] + inner.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def in_original_names(tensors: Tensors, nets: Nets) -> Tensors:
    """The UNet's layers by the names of the original layout, as trainers of SDXL write them."""
    names = {}
    for part, name in layers(nets):
        if part == "unet":
            original = original_layout.unet_name(f"{name}.weight").removesuffix(".weight")
            names[PREFIX["unet"] + name.replace(".", "_")] = PREFIX["unet"] + original.replace(
                ".", "_"
            )
    return {
        names.get(k.split(".")[0], k.split(".")[0]) + k[k.index(".") :]: v
        for k, v in tensors.items()
    }


def pointed(drawn: Mapping[tuple[str, str], Any]) -> Tensors:
    """As diffusers and peft write them, without alpha."""
    tensors = {}
    for (part, name), (down, up) in drawn.items():
        inner = name if part == "unet" else f"text_model.{name}"
        tensors[f"{part}.{inner}.lora_A.weight"] = down
        tensors[f"{part}.{inner}.lora_B.weight"] = up
    return tensors


@pytest.fixture(scope="module")
def loras(nets: Nets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kohya, original (both of one content), pointed, and unet and text alone."""
    path = tmp_path_factory.mktemp("loras")
    drawn = halves(attention(nets), 1)
    save_file(kohya(drawn), path / "kohya.safetensors")
    save_file(in_original_names(kohya(drawn), nets), path / "original.safetensors")
    save_file(pointed(halves(attention(nets), 2)), path / "pointed.safetensors")
    parts = {"text": {}, "unet": {}}  # type: dict[str, dict[tuple[str, str], Any]]
    for place, halved in halves(attention(nets), 3).items():
        parts["unet" if place[0] == "unet" else "text"][place] = halved
    for name, part in parts.items():
        save_file(kohya(part), path / f"{name}.safetensors")
    convolutions = {k: v for k, v in layers(nets).items() if k[0] == "unet"}
    save_file(kohya(halves(convolutions, 4)), path / "every.safetensors")
    return path


def use(pipeline: Any, loras: Path, **weights: float) -> None:
    pipeline.unload_lora_weights()
    for name in weights:
        pipeline.load_lora_weights(
            loras, weight_name=f"{name}.safetensors", adapter_name=name, local_files_only=True
        )
    if weights:
        pipeline.set_adapters(list(weights), list(weights.values()))


def their_latents(pipeline: Any, nets: Nets) -> torch.Tensor:
    pipeline.scheduler = build_scheduler(JOB.scheduler, nets.scheduler_config)
    latents: torch.Tensor = pipeline(
        JOB.prompt,
        num_inference_steps=JOB.num_inference_steps,
        guidance_scale=JOB.guidance_scale,
        width=128,
        height=128,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(JOB.seed),
    ).images[0]
    return latents


SLOW = pytest.mark.slow
CASES = [
    pytest.param({"kohya": 1.0}, marks=SLOW),
    {"original": 0.7},
    pytest.param({"pointed": 0.8}, marks=SLOW),
    {"text": 1.0},
    pytest.param({"unet": -0.5}, marks=SLOW),
    {"kohya": 0.5, "pointed": 0.6},
]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("weights", CASES, ids=str)
def test_latents_are_the_references(
    weights: dict[str, float],
    nets: Nets,
    pipeline: Any,
    loras: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tuple(Lora(name, weight, weight) for name, weight in weights.items())
    monkeypatch.setattr("tests.golden.test_parity.Engine", partial(Engine, loras=loras))
    ours = our_latents(nets, monkeypatch, replace(JOB, loras=asked))[JOB.seed]
    use(pipeline, loras, **weights)
    theirs, bound = with_bound(pipeline.unet, lambda: their_latents(pipeline, nets))
    assert difference(ours, theirs) <= bound
    plain = our_latents(nets, monkeypatch, JOB)[JOB.seed]
    assert difference(plain, theirs) > 20 * bound  # it does something


def test_layers_of_every_kind(nets: Nets, loras: Path) -> None:
    """Convolutions and time embeddings too: the same as with changed weights."""
    wanted: dict[str, tuple[Any, torch.Tensor]] = {}
    for (part, name), change in read_lora(loras / "every.safetensors").items():
        [layer] = [
            v for (p, n), v in layers(nets).items() if (p, n.replace(".", "_")) == (part, name)
        ]
        weight: Any = layer.weight
        product = (change.up.flatten(1) @ change.down.flatten(1)).view(weight.shape)
        wanted[name] = (layer, weight + 0.5 * change.scale * product)
    users = Loras({"unet": nets.unet}, loras)
    users.use(users.find((Lora("every", 0.5, 0.5),)))
    try:
        for layer, merged in wanted.values():
            if isinstance(layer, Conv2d):
                x = torch.randn(2, merged.shape[1], 9, 9)
                found = torch.nn.functional.conv2d(
                    x, merged, layer.bias, layer.stride, layer.padding
                )
            else:
                x = torch.randn(2, 5, merged.shape[1])
                found = torch.nn.functional.linear(x, merged, layer.bias)
            assert difference(layer(x), found) <= summed(merged[0].numel())
    finally:
        users.use(NO_LORAS)
    assert len(wanted) == sum(place[0] == "unet" for place in layers(nets))


def test_every_original_name_is_known(nets: Nets) -> None:
    for part, name in layers(nets):
        if part == "unet":
            original = original_layout.unet_name(f"{name}.weight").removesuffix(".weight")
            assert diffusers_name(original.replace(".", "_")) == name.replace(".", "_")
            assert diffusers_name(name.replace(".", "_")) == name.replace(".", "_")


def pictures(engine: Engine, *jobs: ImageParams) -> list[bytes]:
    for n, params in enumerate(jobs):
        engine.submit(str(n), params)
    found: dict[str, bytes] = {}
    while not engine.idle:
        for outcome in engine.tick():
            assert outcome.error is None
            found[outcome.job_id] = outcome.pictures[0].rgb
    return [found[str(n)] for n in range(len(jobs))]


def test_nothing_of_it_stays(nets: Nets, loras: Path) -> None:
    """Before, beside and after jobs with a LoRA a job without has the same bytes, and they share
    no call.
    """
    engine = Engine(nets, loras=loras)
    strong, weak = (replace(JOB, loras=(Lora("kohya", w, w),)) for w in (1.0, 0.5))
    [before] = pictures(engine, JOB)
    alone = [pictures(engine, job)[0] for job in (strong, weak)]
    shapes = []
    add = engine.device_time.add

    def seen(images: Any, work: int, began: Any) -> None:
        shapes.append({run.loras for run in images})
        add(images, work, began)

    engine.device_time.add = seen  # type: ignore[method-assign]
    beside, *others = pictures(engine, JOB, strong, weak, replace(strong, seed=4))
    [after] = pictures(engine, JOB)
    assert before == beside == after
    assert others[:2] == alone and len({before, *alone}) == 3
    assert all(len(found) == 1 for found in shapes)
    engine.close()


@pytest.mark.slow
def test_a_leak_would_be_seen(nets: Nets, loras: Path) -> None:
    """The mutant: what a LoRA changed is not put back."""
    engine = Engine(nets, loras=loras)
    [before] = pictures(engine, JOB)
    use = Loras.use
    with red(Loras, "use", lambda self, asked: asked != NO_LORAS and use(self, asked)):
        pictures(engine, replace(JOB, loras=(Lora("kohya"),)))
        assert pictures(engine, JOB)[0] == before
    engine.variants.loras.use(NO_LORAS)
    assert pictures(engine, JOB)[0] == before
    engine.close()


def test_a_tag_in_the_prompt_is_the_field(nets: Nets, loras: Path) -> None:
    engine = Engine(nets, loras=loras)
    tagged = replace(JOB, prompt="<lora:kohya:0.5>a house", negative_prompt=None)
    field = replace(JOB, loras=(Lora("kohya", 0.5, 0.5),))
    assert len(set(pictures(engine, tagged, field))) == 1
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "left", "found"),
    [
        ("a <lora:x:0.8> b", "a  b", [Lora("x", 0.8, 0.8)]),
        ("<lora:x>", "", [Lora("x")]),
        ("<lora:x:0.8:0.3>", "", [Lora("x", 0.3, 0.8)]),
        ("<lora:my style v1.2:-1>", "", [Lora("my style v1.2", -1.0, -1.0)]),
        ("<lora:x:.5><lora:y:2>", "", [Lora("x", 0.5, 0.5), Lora("y", 2.0, 2.0)]),
        ("<lora:../x:1>", "<lora:../x:1>", []),
        ("<lora:x:one>", "<lora:x:one>", []),
        ("lora:x:1", "lora:x:1", []),
    ],
)
def test_tags(prompt: str, left: str, found: list[Lora]) -> None:
    assert Prompt(prompt).text == left
    assert list(ImageParams(prompt).all_loras) == found


def test_a_second_try_in_float32_keeps_its_loras(nets: Nets, loras: Path) -> None:
    """And takes none of another's: the copy is made of the plain net."""
    engine = Engine(nets, loras=loras)
    asked = replace(JOB, loras=(Lora("kohya"),))
    variants = engine.variants
    variants.loras.use(variants.loras.find(asked.loras))
    unet, _, _ = variants.in_float32()
    assert not any(layer.changes for layer in unet.net.modules() if isinstance(layer, Layer))
    engine.submit("x", asked)
    engine.tick()
    [run] = engine.jobs["x"].runs
    run.float32_retry = True
    again = variants.unet_of(run)
    assert any(layer.changes for layer in again.net.modules() if isinstance(layer, Layer))
    engine.close()


def test_a_file_may_go_while_its_picture_is_made(nets: Nets, loras: Path, tmp_path: Path) -> None:
    """It was read when the job began; a plain job in between has the nets change back and forth."""
    file = Path(shutil.copy(loras / "kohya.safetensors", tmp_path / "kohya.safetensors"))
    engine = Engine(nets, loras=tmp_path)
    asked = replace(JOB, loras=(Lora("kohya"),))
    [whole] = pictures(engine, asked)
    engine.submit("x", asked)
    engine.tick()
    file.unlink()
    engine.submit("y", JOB)
    found: dict[str, Any] = {}
    while not engine.idle:
        found |= {outcome.job_id: outcome for outcome in engine.tick()}
    assert found["x"].pictures[0].rgb == whole and found["y"].error is None
    engine.close()


def test_another_file_of_the_same_name_is_another_lora(
    nets: Nets, loras: Path, tmp_path: Path
) -> None:
    """For the nets, and for the texts that are kept."""
    file = tmp_path / "style.safetensors"
    asked = replace(JOB, loras=(Lora("style"),))
    engine = Engine(nets, loras=tmp_path)
    found = []
    for name in ("kohya", "pointed", "kohya"):
        shutil.copy(loras / f"{name}.safetensors", file)
        found += pictures(engine, asked)
    assert found[0] == found[2] != found[1]
    engine.close()


REFUSED: list[tuple[Tensors, str]] = [
    ({"lora_unet_conv_in.hada_w1_a": torch.zeros(2, 2)}, "only plain LoRA is read"),
    ({"lora_unet_x.dora_scale": torch.zeros(2)}, "only plain LoRA is read"),
    ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "half a change of x"),
    ({"decoder.weight": torch.zeros(2)}, "is not a LoRA of SDXL"),
    (
        {"unet.x.lora_A.weight": torch.zeros(2, 4), "unet.x.lora_B.weight": torch.zeros(4, 3)},
        "do not fit together",
    ),
]


@pytest.mark.parametrize(("tensors", "said"), REFUSED, ids=lambda v: ascii(v)[:30])
def test_other_files_are_refused(tensors: Tensors, said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointRefused, match=said):
        read_lora(tmp_path / "x.safetensors")


def test_what_does_not_fit_the_checkpoint_fails_its_job_alone(
    nets: Nets, loras: Path, tmp_path: Path
) -> None:
    wide = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 999),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(128, 2),
    }
    save_file(wide, tmp_path / "wide.safetensors")
    save_file(
        {
            "lora_unet_none.lora_down.weight": torch.zeros(1, 1),
            "lora_unet_none.lora_up.weight": torch.zeros(1, 1),
        },
        tmp_path / "none.safetensors",
    )
    (tmp_path / "text.safetensors").write_text("hello, not a LoRA")
    engine = Engine(nets, loras=tmp_path)
    for name, code in (
        ("wide", "bad_lora"),
        ("none", "bad_lora"),
        ("text", "bad_lora"),
        ("missing", "unknown_lora"),
    ):
        engine.submit(name, replace(JOB, loras=(Lora(name),)))
        [outcome] = engine.tick()
        assert isinstance(outcome.error, JobFailed) and outcome.error.code == code
    assert pictures(engine, JOB) == pictures(Engine(nets), JOB)
    engine.close()
