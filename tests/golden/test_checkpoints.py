"""Full SDXL structure at reduced width, in both layouts: the same nets, the same picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from imaged.catalogue import MICRO
from imaged.engine.engine import Engine
from imaged.engine.load import load
from imaged.engine.nets.vae import VAE
from imaged.errors import CheckpointRefused
from imaged.params import ImageParams
from tests.golden import original_layout

CPU = torch.device("cpu")


def reduced_nets() -> dict[str, Any]:
    """SDXL's blocks, depths in the pattern 0-1-2, heads of 64; only the widths are small."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 49408,
        "num_hidden_layers": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    return {
        "unet": UNet2DConditionModel(
            sample_size=128,
            in_channels=4,
            out_channels=4,
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 2),
            cross_attention_dim=192,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=128 + 6 * 256,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=2,
            sample_size=1024,
            scaling_factor=0.13025,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=1,
                projection_dim=64,
                hidden_act="quick_gelu",
                **text,
            )
        ),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=128,
                intermediate_size=256,
                num_attention_heads=2,
                projection_dim=128,
                hidden_act="gelu",
                **text,
            )
        ),
    }


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    return reduced_nets()


@pytest.fixture(scope="module")
def folder(source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "reduced"
    for name, net in source.items():
        net.save_pretrained(path / name, safe_serialization=True)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MICRO / name, path / name)
    shutil.copy(MICRO / "model_index.json", path)
    return path


@pytest.fixture(scope="module")
def single_file(source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "reduced.safetensors"
    original_layout.write(path, source)
    return path


def picture(checkpoint: Path) -> bytes:
    engine = Engine(load(checkpoint, CPU))
    engine.submit(
        "x", ImageParams("a house", num_inference_steps=20, seed=3, img_width=128, img_height=128)
    )
    while not (outcomes := engine.tick()):
        pass
    assert outcomes[0].error is None
    return outcomes[0].pictures[0].rgb


@pytest.mark.parametrize("layout", ["folder", "single_file"])
def test_every_tensor_arrives(
    layout: str, source: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    nets = load(request.getfixturevalue(layout), CPU)
    for name, net in source.items():
        ours = getattr(nets, name).state_dict()
        theirs = {
            key.removeprefix("text_model."): value
            for key, value in net.state_dict().items()
            if name != "vae" or not key.startswith(VAE.IGNORED)  # the encoder stays in the file
        }
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert nets.scheduler_config["beta_schedule"] == "scaled_linear"


def test_configs_are_read_off_the_shapes(source: dict[str, Any], single_file: Path) -> None:
    nets = load(single_file, CPU)
    for name in (
        "block_out_channels",
        "attention_head_dim",
        "cross_attention_dim",
        "transformer_layers_per_block",
        "down_block_types",
        "up_block_types",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    ):
        ours, theirs = getattr(nets.unet.config, name), getattr(source["unet"].config, name)
        assert tuple(ours) == tuple(theirs) if isinstance(theirs, tuple | list) else ours == theirs
    assert nets.vae.config.scaling_factor == 0.13025
    assert nets.text_encoder.config.hidden_act == "quick_gelu"
    assert nets.text_encoder_2.config.hidden_act == "gelu"


def test_both_layouts_give_the_same_bytes(folder: Path, single_file: Path) -> None:
    assert picture(folder) == picture(single_file)


def test_other_files_are_refused_with_a_reason(folder: Path, tmp_path: Path) -> None:
    import pickle

    from safetensors.torch import save_file

    renamed = tmp_path / "pickle.safetensors"
    renamed.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointRefused, match="not a safetensors file"):
        load(renamed, CPU)
    other = tmp_path / "other.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(2)}, other)
    with pytest.raises(CheckpointRefused, match="not a VAE"):
        load(other, CPU)
    with pytest.raises(CheckpointRefused, match="no file or folder"):
        load(tmp_path / "missing", CPU)
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(CheckpointRefused, match="lacks vae"):
        load(partial, CPU)
    (tmp_path / "broken").mkdir()
    broken = shutil.copytree(folder, tmp_path / "broken" / "x")
    (broken / "model_index.json").write_text(json.dumps({}))
    (broken / "unet" / "config.json").write_text("{not json")
    with pytest.raises(CheckpointRefused):
        load(broken, CPU)


def changed(folder: Path, to: Path, part: str, **config: Any) -> Path:
    """A copy of the folder with some values of one part's config changed."""
    copy = Path(shutil.copytree(folder, to))
    file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return copy


def test_what_would_come_out_wrong_is_refused(folder: Path, tmp_path: Path) -> None:
    """Missing weights, other tasks, other noise: the libraries load them with a warning."""
    from safetensors.torch import load_file, save_file

    thin = Path(shutil.copytree(folder, tmp_path / "thin"))
    file = thin / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointRefused, match="lacks 1 weights, text_projection"):
        load(thin, CPU)
    cut = Path(shutil.copytree(folder, tmp_path / "cut"))
    file = cut / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointRefused):
        load(cut, CPU)
    for name, config, said in (
        ("edm", {"_class_name": "EDMDPMSolverMultistepScheduler"}, "not one of SDXL's"),
        ("sample", {"prediction_type": "sample"}, "prediction type sample"),
    ):
        with pytest.raises(CheckpointRefused, match=said):
            load(changed(folder, tmp_path / name, "scheduler", **config), CPU)
    inpaint = Path(shutil.copytree(folder, tmp_path / "inpaint"))
    nine = UNet2DConditionModel.from_config({**reduced_nets()["unet"].config, "in_channels": 9})
    nine.save_pretrained(inpaint / "unet")
    with pytest.raises(CheckpointRefused, match="inpainting"):
        load(inpaint, CPU)


def test_marked_single_files_are_refused(single_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single_file)
    save_file({**tensors, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointRefused, match=r"does not predict noise \(v_pred\)"):
        load(tmp_path / "v.safetensors", CPU)
    said = {"modelspec.prediction_type": "v"}
    save_file(tensors, tmp_path / "m.safetensors", metadata=said)
    with pytest.raises(CheckpointRefused, match=r"does not predict noise \(v\)"):
        load(tmp_path / "m.safetensors", CPU)


def test_half_precision_variants_load(folder: Path, tmp_path: Path) -> None:
    """The form in which SDXL checkpoints are mostly handed around: *.fp16.safetensors alone."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for file in list((half / part).glob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert picture(half) == picture(folder)
