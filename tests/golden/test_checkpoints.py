"""Full SDXL structure at reduced width, in both layouts: the same nets, the same picture."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from bench.sides.models import SHAPES
from imaged.catalogue.model import Weights
from imaged.engine.cpu import Cpu
from imaged.engine.engine import Engine
from imaged.engine.loading.load import Nets, _slowly, load, numbers, size, with_dtypes
from imaged.engine.nets.vae import VAE
from imaged.errors import CheckpointRefused
from imaged.params.image_params import ImageParams
from imaged.sampling.schedulers import SCHEDULERS
from tests.oracle import build_scheduler

CPU = torch.device("cpu")
JOB = ImageParams("a house", num_inference_steps=4, seed=3, img_width=128, img_height=128)


def picture(checkpoint: Path) -> bytes:
    return draw(load(checkpoint, CPU), JOB)


def draw(nets: Nets, params: ImageParams) -> bytes:
    engine = Engine(nets)
    engine.submit("x", params)
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
    with pytest.raises(CheckpointRefused, match="is a pickle"):
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
    nine = UNet2DConditionModel(**{**SHAPES["reduced"].unet(), "in_channels": 9})
    nine.save_pretrained(inpaint / "unet")
    with pytest.raises(CheckpointRefused, match="inpainting"):
        load(inpaint, CPU)


def test_folders_of_other_models_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def copy(name: str, *without: str, kind: str = "StableDiffusionXLPipeline") -> Path:
        to = Path(shutil.copytree(folder, tmp_path / name))
        (to / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        for part in without:
            shutil.rmtree(to / part)
        return to

    for path, said in (
        (copy("flux", kind="FluxPipeline"), "flux holds a FluxPipeline, not an SDXL checkpoint"),
        (copy("old", kind="StableDiffusionPipeline"), "holds a StableDiffusionPipeline"),
        (copy("second", "text_encoder", "tokenizer"), "second is the SDXL refiner"),
        (copy("none", "vae", "scheduler"), "lacks vae, scheduler"),
    ):
        with pytest.raises(CheckpointRefused, match=said):
            load(path, CPU)
    plain = copy("plain")
    (plain / "model_index.json").rename(plain / "other.safetensors")
    with pytest.raises(CheckpointRefused, match=r"if other\.safetensors is meant, name the file"):
        load(plain, CPU)
    pickled = copy("pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointRefused, match=r"model\.bin is a pickle: a pickle can run code"):
        load(pickled, CPU)


def test_shards_load_and_a_missing_one_is_named(
    source: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    shutil.rmtree(sharded / "unet")
    source["unet"].save_pretrained(sharded / "unet", max_shard_size="4MB")
    shards = sorted((sharded / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    unet, whole = (load(path, CPU).unet.state_dict() for path in (sharded, folder))
    assert all(torch.equal(unet[key], whole[key]) for key in whole)
    shards[1].unlink()
    with pytest.raises(CheckpointRefused, match=rf"should hold {len(shards)} files like"):
        load(sharded, CPU)


def test_marked_single_files_are_read_by_their_marks(single_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(single_file), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    marked = tmp_path / "v.safetensors"
    save_file(tensors, marked)
    config = load(marked, CPU).scheduler_config
    plain = load(single_file, CPU).scheduler_config
    v = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    assert config == {**plain, **v}
    told = Weights(marked, prediction="epsilon", zero_snr=False)
    assert load(told, CPU).scheduler_config == {**config, "prediction_type": "epsilon"} | {
        "rescale_betas_zero_snr": False,
    }
    told = Weights(single_file, prediction="v_prediction", zero_snr=True)
    assert load(told, CPU).scheduler_config == config
    assert picture(marked) != picture(single_file)


def test_a_given_vae_is_taken(
    source: dict[str, Any], folder: Path, single_file: Path, tmp_path: Path
) -> None:
    """Into either layout, from a file or a folder; and a file without a VAE needs one."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(7)
    other = AutoencoderKL.from_config(source["vae"].config)
    other.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    without = tmp_path / "without.safetensors"
    tensors = load_file(single_file)
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage")}, without)
    with pytest.raises(CheckpointRefused, match="--vae FILE"):
        load(without, CPU)
    for checkpoint, vae in ((folder, file), (single_file, tmp_path / "vae"), (without, file)):
        ours = load(Weights(checkpoint, vae), CPU).vae.state_dict()
        assert all(torch.equal(ours[key], other.state_dict()[key]) for key in ours)
    assert load(Weights(folder, file), CPU).sha256 != load(folder, CPU).sha256


@pytest.mark.parametrize(
    ("dtype", "unet", "vae"),
    [
        ("", torch.float32, torch.float32),
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float32),  # SDXL's VAE overflows in it
    ],
)
def test_weights_are_held_as_told(
    single_file: Path, dtype: str, unet: torch.dtype, vae: torch.dtype
) -> None:
    for cpu_dtype in ("", "bf16") if dtype else ("",):
        assert held(Weights(single_file, dtype=dtype, cpu_dtype=cpu_dtype)) == (unet, vae)


def held(weights: Weights) -> tuple[torch.dtype, torch.dtype]:
    """The types of UNet and VAE on the CPU."""
    nets = load(weights, CPU)
    assert nets.unet.dtype == nets.text_encoder.dtype == nets.text_encoder_2.dtype
    return nets.unet.dtype, nets.vae.dtype


@pytest.mark.parametrize("layout", ["folder", "single_file"])
def test_what_was_found_to_suit_a_cpu_is_kept(
    layout: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """On any CPU: one that does not compute in bfloat16 itself is slow, and says so once."""
    weights = Weights(request.getfixturevalue(layout), cpu_dtype="bf16")
    count = numbers(weights)
    assert count["vae"] > 0 and count["texts"] > 0 and count["unet"] > 0
    assert size(weights, CPU) == sum(count.values()) * 2 + count["vae"] * 2
    _slowly.cache_clear()
    for flags, warned in (("amx_bf16", 0), ("", 1), ("", 1)):
        cpu = Cpu(frozenset({flags}), "AVX512")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cpu, "here", lambda cpu=cpu: cpu)
            assert held(weights) == (torch.bfloat16, torch.float32)
        assert caplog.text.count("which this CPU does not compute in itself") == warned
        if cpu.has_bf16:
            _slowly.cache_clear()
    assert held(replace(weights, cpu_dtype="fp32")) == (torch.float32, torch.float32)
    assert load(weights, CPU).nbytes <= size(weights, CPU)


@pytest.mark.parametrize(
    ("dtypes", "unet", "vae"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16 and float32", torch.float16, torch.float32),
        ("bfloat16 and float32", torch.bfloat16, torch.float32),
    ],
)
def test_a_receipts_types_are_loaded_again(
    single_file: Path, dtypes: str, unet: torch.dtype, vae: torch.dtype
) -> None:
    """Whatever the model is held in by now; a model that has them already is not loaded twice."""
    held_now: list[dict[str, Any]]
    held_now = [{}, {"dtype": "bf16"}, {"cpu_dtype": "bf16"}, {"cpu_dtype": "fp32"}]
    for now in held_now:
        weights = Weights(single_file, **now)
        again = with_dtypes(weights, f"cpu {dtypes}", CPU)
        assert held(again) == (unet, vae)
        assert (again == weights) is (held(weights) == (unet, vae))
        assert with_dtypes(weights, f"cuda {dtypes}", CPU) == weights


def test_a_vae_that_overflows_in_half_precision_makes_no_black_picture(
    source: dict[str, Any], single_file: Path, tmp_path: Path
) -> None:
    """SDXL's own does: it has activations beyond 65,504, the largest number in float16."""
    from safetensors.torch import load_file, save_file

    tensors = {
        k: v.half() if v.is_floating_point() else v for k, v in load_file(single_file).items()
    }
    first = "first_stage_model.decoder.conv_in.weight"
    tensors[first] = (tensors[first].float() * 3e5).half()
    assert bool(torch.isfinite(tensors[first]).all())
    loud = tmp_path / "loud.safetensors"
    save_file(tensors, loud)
    nets = load(Weights(loud, dtype="fp16"), CPU)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert bool(torch.isfinite(nets.vae(z)).all())
        assert not bool(torch.isfinite(nets.vae.half()(z.half())).all())


def test_a_file_that_was_exchanged_is_refused(single_file: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(single_file, tmp_path / "model.safetensors"))
    nets = load(file, CPU)
    assert nets.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert nets.file_bytes == file.stat().st_size
    recorded = Weights(file, sha256=nets.sha256)
    load(recorded, CPU)
    with file.open("r+b") as opened:  # one number of the last tensor, sizes and times aside
        opened.seek(-3, 2)
        opened.write(b"\x01")
    with pytest.raises(CheckpointRefused, match="is not the file that was added"):
        load(recorded, CPU)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        pytest.param({}, SCHEDULERS, marks=pytest.mark.slow),
        ({"prediction": "v_prediction", "zero_snr": True}, ("Euler", "DDIM", "UniPC")),
    ],
    ids=["epsilon", "v"],
)
def test_samplers_draw_the_pictures_of_the_librarys_own_loader(
    folder: Path, single_file: Path, said: dict[str, Any], names: tuple[str, ...]
) -> None:
    """diffusers' from_single_file, told the configs, and its pipeline: within one level."""
    from diffusers import StableDiffusionXLPipeline

    theirs = StableDiffusionXLPipeline.from_single_file(
        single_file, config=str(folder), local_files_only=True, add_watermarker=False
    )
    theirs.set_progress_bar_config(disable=True)
    nets = load(Weights(single_file, **said), CPU)
    for name in names:
        theirs.scheduler = build_scheduler(name, nets.scheduler_config)
        job = replace(JOB, scheduler=name)
        image = theirs(
            job.prompt,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            width=128,
            height=128,
            generator=torch.Generator("cpu").manual_seed(job.seed),
        ).images[0]
        ours = torch.frombuffer(bytearray(draw(nets, job)), dtype=torch.uint8).int()
        levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
        assert int((ours - levels).abs().max()) <= 1, name


def test_half_precision_variants_load(folder: Path, tmp_path: Path) -> None:
    """The form in which SDXL checkpoints are mostly handed around: *.fp16.safetensors alone."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for file in list((half / part).glob("*.safetensors")):
            file.rename(file.with_suffix(".fp16.safetensors"))
    assert picture(half) == picture(folder)
