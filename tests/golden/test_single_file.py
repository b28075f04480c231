"""A file in the original layout gives what diffusers' own conversion gives, bit by bit."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from bench.sides import original_layout
from bench.sides.models import Shape, Text
from imaged.catalogue.model import Weights
from imaged.checkpoint_info.metadata import noise, scheduler_config
from imaged.engine.loading.single_file import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    Net,
    read_single_file,
    read_vae,
)
from imaged.errors import CheckpointRefused
from imaged.weight_files import Header

Tensors = dict[str, torch.Tensor]
DECODER = ("decoder.", "post_quant_conv.")
BUILT = ("dtype", "architectures", "_use_default_values")  # of a config: how a net came about


#: SDXL's count of blocks and layers; widths are small, and differ where SDXL's may be equal.
FULL_DEPTH = Shape(
    (64, 128, 192),
    (1, 2, 10),
    (1, 2, 3),
    32,
    32,
    128,
    (32, 64, 96, 128),
    2,
    32,
    (Text(64, 12, 1, "quick_gelu", 64), Text(128, 32, 2, "gelu", 160)),
)


def full_depth_nets() -> dict[str, Any]:
    torch.manual_seed(0)
    nets = FULL_DEPTH.nets()
    for net in nets.values():
        net.half()
        for parameter in net.parameters():  # as built, all norms are alike and hide exchanges
            parameter.data.normal_()
    return nets


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    return full_depth_nets()


@pytest.fixture(scope="module")
def file(source: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "full.safetensors"
    original_layout.write(path, source)
    return path


@pytest.fixture(scope="module")
def ours(file: Path) -> dict[str, Net]:
    return read_single_file(file)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype
        assert value.is_contiguous()
        assert torch.equal(value, other[key]), key


def theirs(file: Path, source: dict[str, Any]) -> dict[str, Tensors]:
    """What diffusers makes of the file, told the configs."""
    tensors = load_file(file)
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), source["vae"].config)
    two = SimpleNamespace(config=source["text_encoder_2"].config)
    return {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), source["unet"].config),
        "vae": {k: v for k, v in vae.items() if k.startswith(DECODER)},
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(
            {k: v for k, v in tensors.items() if k.startswith(CLIP)}
        ),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(
            two, dict(tensors), prefix=OPEN_CLIP
        ),
    }


def test_every_tensor_is_as_diffusers_converts_it(
    file: Path, source: dict[str, Any], ours: dict[str, Net]
) -> None:
    converted = theirs(file, source)
    assert ours.keys() == converted.keys()
    for name, (_, tensors) in ours.items():
        same(tensors, converted[name])


def test_every_tensor_is_where_it_came_from(source: dict[str, Any], ours: dict[str, Net]) -> None:
    """Under the names of SDXL's own folders: `text_model.` in both text encoders."""
    assert len(ours["unet"][1]) == 1680  # as many as SDXL's UNet has
    for name, net in source.items():
        state = net.state_dict()
        if name == "vae":
            state = {k: v for k, v in state.items() if k.startswith(DECODER)}
        if name == "text_encoder":
            state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in state.items()}
        same(ours[name][1], state)


def test_configs_describe_the_nets(source: dict[str, Any], ours: dict[str, Net]) -> None:
    """Every value read off the shapes, and nothing left out whose default is another."""

    def plain(config: Any) -> dict[str, Any]:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {k: v for k, v in values.items() if k not in BUILT}

    for name, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        wanted, (config, _) = plain(source[name].config), ours[name]
        assert {**wanted, **config} == wanted
        with torch.device("meta"):
            assert plain(cls(**config).config) == wanted
    for name in ("text_encoder", "text_encoder_2"):
        wanted, (config, _) = plain(source[name].config), ours[name]
        assert {**wanted, **config} == wanted
        assert plain(CLIPTextConfig(**config)) == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_stay_in_the_mapped_file(file: Path, ours: dict[str, Net]) -> None:
    lines = [x for x in Path("/proc/self/maps").read_text().splitlines() if file.name in x]
    mapped = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    copied = [
        key
        for _, tensors in ours.values()
        for key, value in tensors.items()
        if not any(first <= value.data_ptr() < last for first, last in mapped)
    ]
    assert copied == ["text_projection.weight"]


def test_what_else_files_carry_is_left_out(
    file: Path, ours: dict[str, Net], tmp_path: Path
) -> None:
    """Averages, schedules, other nets; and a decoder needs no encoder."""
    one = torch.zeros(1)
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith(f"{VAE}encoder.")}
    extra = (
        *("model_ema.decay", "model_ema.diffusion_modelout2weight", "alphas_cumprod", "betas"),
        *("denoiser.sigmas", f"{UNET}sigmas", f"{VAE}loss.logvar", f"{VAE}quant_conv.bias"),
        *(f"{CLIP}embeddings.position_ids", f"{OPEN_CLIP}logit_scale", f"{OPEN_CLIP}attn_mask"),
        *("conditioner.embedders.0.transformer.text_projection.weight", "lora.up.weight"),
    )
    save_file({**tensors, **{key: one.clone() for key in extra}}, tmp_path / "x.safetensors")
    for name, (config, found) in read_single_file(tmp_path / "x.safetensors").items():
        assert config == ours[name][0]
        same(found, ours[name][1])


def test_what_is_strange_within_a_net_is_handed_on(file: Path, tmp_path: Path) -> None:
    """A net with more in it than SDXL's is another net: loading it strictly tells."""
    strange = (f"{UNET}input_blocks.4.2.x", f"{UNET}out.2.y", f"{VAE}decoder.up.1.attn.0.q.weight")
    added = {key: torch.zeros(1) for key in strange}
    save_file({**load_file(file), **added}, tmp_path / "x.safetensors")
    nets = read_single_file(tmp_path / "x.safetensors")
    assert {"input_blocks.4.2.x", "conv_out.y"} <= nets["unet"][1].keys()
    assert "decoder.up.1.attn.0.q.weight" in nets["vae"][1]


def test_projections_of_one_dimension_less_are_read(
    file: Path, ours: dict[str, Net], tmp_path: Path
) -> None:
    """Some files hold the VAE's attention as matrices already."""
    tensors = load_file(file)
    for letter in ("q", "k", "v", "proj_out"):
        key = f"{VAE}decoder.mid.attn_1.{letter}.weight"
        assert tensors[key].ndim == 4
        tensors[key] = tensors[key].flatten(1)
    save_file(tensors, tmp_path / "x.safetensors")
    same(read_single_file(tmp_path / "x.safetensors")["vae"][1], ours["vae"][1])


@pytest.mark.slow
def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = load_file(file)

    def refused(said: str, metadata: dict[str, str] | None = None, /, **changed: Any) -> None:
        kept = {**tensors, **changed}
        save_file({k: v for k, v in kept.items() if v is not None}, path, metadata=metadata)
        with pytest.raises(CheckpointRefused, match=said):
            read_single_file(path)
            scheduler_config(Weights(path))

    refused("predicts sample, which is not served", {"modelspec.prediction_type": "sample"})
    refused(r"is an EDM model", edm_mean=torch.zeros(4))
    for prefix, what in (
        (UNET, "a UNet"),
        (VAE, "a VAE"),
        (CLIP, "the first text encoder"),
        (OPEN_CLIP, "the second text encoder"),
    ):
        refused(f"not {what} at {prefix}", **{k: None for k in tensors if k.startswith(prefix)})
    refused("one can be given along with it", **{k: None for k in tensors if k.startswith(VAE)})
    refused("there is no text_projection", **{f"{OPEN_CLIP}text_projection": None})
    refused("is not an SDXL checkpoint", **{f"{UNET}out.2.weight": torch.tensor(1.0)})
    eight = tensors[f"{UNET}out.2.weight"].to(torch.float8_e4m3fn)
    refused("is of type F8_E4M3", **{f"{UNET}out.2.weight": eight})
    for content in (pickle.dumps({"a": 1}), b"", file.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(CheckpointRefused, match=r"is a pickle|is empty|is damaged"):
            read_single_file(path)


V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("marks", "remarks", "said"),
    [
        ((), {}, {"prediction_type": "epsilon"}),
        ((), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        (("v_pred",), {}, V),
        (("v_pred", "ztsnr"), {}, {**V, **ZERO}),
        ((), {"modelspec.prediction_type": "v"}, V),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, {**V, **ZERO}),
        ((), {"ss_v_parameterization": "False"}, {"prediction_type": "epsilon"}),
        (("ztsnr",), {}, {"prediction_type": "epsilon", **ZERO}),
    ],
)
def test_what_files_say_of_their_noise(
    marks: tuple[str, ...], remarks: dict[str, str], said: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"x": torch.zeros(1), **{mark: torch.zeros(0) for mark in marks}}
    save_file(tensors, path, metadata=remarks)
    spacing = {"timestep_spacing": "trailing"} if "rescale_betas_zero_snr" in said else {}
    assert noise(Header.read(path)) == {**said, **spacing}


@pytest.mark.parametrize("form", ["prefixed", "bare", "diffusers"])
def test_a_vae_of_its_own(
    form: str, file: Path, source: dict[str, Any], ours: dict[str, Net], tmp_path: Path
) -> None:
    """In the three forms in which people have it, the same tensors and config."""
    path = tmp_path / "vae.safetensors"
    within = {k: v for k, v in load_file(file).items() if k.startswith(VAE)}
    tensors = {
        "prefixed": within,
        "bare": {k.removeprefix(VAE): v for k, v in within.items()},
        "diffusers": source["vae"].state_dict(),
    }[form]
    save_file(tensors, path)
    config, found = read_vae(path)
    assert config == ours["vae"][0]
    same(dict(found), dict(ours["vae"][1]))
    save_file({k: v for k, v in tensors.items() if ".encoder." in f".{k}"}, path)
    with pytest.raises(CheckpointRefused, match="holds no VAE"):
        read_vae(path)
