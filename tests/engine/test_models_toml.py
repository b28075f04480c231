"""models.toml: what is read, and what is said of what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from imaged.catalogue import aliases, toml
from imaged.catalogue.model import DEFAULT_SLUG, MICRO
from imaged.cli import main
from imaged.engine.cpu import MIN_BF16_PARAMETERS, Cpu, cpu_dtype
from imaged.engine.loading.load import load
from imaged.errors import CommandError
from imaged.params.image_params import plain, read_params
from imaged.params.knobs import KNOBS
from imaged.store import catalogue
from imaged.store.sql.database import Database

OWN = """
[model.own]
checkpoint = "weights/own.safetensors"
vae = "/srv/vae.safetensors"
dtype = "bf16"
cpu_dtype = "bf16"
prediction = "v_prediction"
zero_snr = true
title = "Own"
description = "Mine."
licence = "Mine too."
price = 0.02
sample = { prompt = "a house", img_width = 768, img_height = 768 }

[model.own.parameters]
guidance_scale = { low = 2, high = 10, default = 5 }
img_width = { high = 1024 }
scheduler = { choices = ["Euler a", "DPM++ 2M Karras"], default = "Euler a" }
negative_prompt = { default = "blurry" }
base64 = { default = true }
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "models.toml"
    path.write_text(text)
    return path


def test_everything_that_a_table_says(tmp_path: Path) -> None:
    [(slug, table)] = toml.tables(written(tmp_path, OWN)).items()
    model = toml.model(slug, table)
    weights = model.weights
    assert (weights.checkpoint, weights.vae) == (
        tmp_path / "weights" / "own.safetensors",
        Path("/srv/vae.safetensors"),
    )
    assert (weights.dtype, weights.prediction, weights.zero_snr) == ("bf16", "v_prediction", True)
    assert weights.cpu_dtype == "bf16"
    assert (model.title, model.description, model.licence) == ("Own", "Mine.", "Mine too.")
    assert model.price_micros == 20_000
    knobs = {knob.name: knob for knob in model.knobs}
    guidance, width, scheduler = (knobs[n] for n in ("guidance_scale", "img_width", "scheduler"))
    assert (guidance.low, guidance.high, guidance.default) == (2, 10, 5.0)
    assert (width.low, width.high, width.default) == (512, 1024, 1024)
    assert scheduler.choices == ("Euler a", "DPM++ 2M Karras")
    params, _ = read_params(model.sample, model.knobs)
    assert (params.scheduler, params.guidance_scale) == ("Euler a", 5.0)
    assert (params.negative_prompt, params.base64, params.img_width) == ("blurry", True, 768)


def test_what_comes_with_imaged() -> None:
    """The page's model with the page's own call, and with its defaults and ranges."""
    found = toml.built_in()
    assert list(found) == [DEFAULT_SLUG, "micro"]
    model = found[DEFAULT_SLUG]
    assert (model.title, model.checkpoint) == ("Yamer's Realistic SDXL", MICRO)
    assert model.knobs == KNOBS
    params, ignored = read_params(model.sample)
    assert (params.num_inference_steps, params.guidance_scale, params.seed) == (30, 7, 565481734)
    assert (params.img_width, params.img_height, params.samples) == (896, 1152, 1)
    assert params.prompt.startswith("1girl, a beautiful shieldmaiden") and not ignored
    assert len(params.prompt) == 1057 and len(params.negative_prompt or "") == 767


def test_what_an_operator_narrows_stays_narrow_under_other_names(tmp_path: Path) -> None:
    """In the dialects and under an alias, which both take more than the page does otherwise."""
    [(slug, table)] = toml.tables(written(tmp_path, OWN)).items()
    own = toml.model(slug, table).knobs
    _, alias = aliases.load(None).ranges["sdxl1.0-txt2img"]
    for knobs in (aliases.widened(own), aliases.merge_knobs(own, alias)):
        found = {knob.name: (knob.low, knob.high) for knob in knobs}
        assert (found["guidance_scale"], found["img_width"]) == ((2, 10), (512, 1024))
        assert (found["img_height"], found["num_inference_steps"]) == ((256, 2048), (4, 150))


WRONG: list[tuple[str, str]] = [
    ("[model.x", "cannot be read"),
    ("[alias.x]", "should hold tables"),
    ("model = 1", "should hold tables"),
    ("[model]\nx = 1", "x should be a table"),
    ('[model."No Slug"]', "a slug is lower-case"),
    ("[model.x]\nchekpoint = 1", "x: there is no field chekpoint; there are title,"),
    ("[model.x]\ntitle = 1", "x: title is of the wrong type"),
    ("[model.x]\nprice = true", "x: price is of the wrong type"),
    ("[model.x]\nprice = 0", "x: price should be between"),
    ("[model.x]\nprice = nan", "x: price should be between"),
    ('[model.x]\ncpu_dtype = "fp16"', "x: cpu_dtype should be one of fp32, bf16"),
    ('[model.x]\ndtype = "int8"', "x: dtype should be one of fp32, bf16, fp16"),
    ('[model.x]\nprediction = "flow"', "x: prediction should be one of epsilon, v_prediction"),
    ("[model.x.parameters]\nsteps = {}", "x: there is no parameter steps"),
    ("[model.x.parameters]\nimg_width = 5", "x: img_width should be numbers"),
    ("[model.x.parameters]\nimg_width = {low = 8}", "x: img_width should stay between 256 and"),
    (
        "[model.x.parameters]\nimg_width = {default = 8}",
        "x: img_width: the default img_width should",
    ),
    (
        "[model.x.parameters]\nimg_width = {high = 768}",
        "x: img_width: the default img_width should",
    ),
    ("[model.x.parameters]\nscheduler = {choices = []}", "x: scheduler should be one of"),
    ('[model.x.parameters]\nscheduler = {choices = ["Foo"]}', "x: scheduler should be one of"),
    ("[model.x.parameters]\nscheduler = {low = 1}", "x: scheduler should be under choices"),
    ("[model.x.parameters]\nprompt = {high = 1}", "x: prompt should be a table with default"),
    ("[model.x.sample]\nseed = 1", "x: the sample's prompt is mandatory"),
    ('[model.x.sample]\nprompt = "x"\nsamples = 9', "x: the sample's samples should be"),
    ('[model.x.sample]\nprompt = "x"\nfoo = nan', "the sample has foo, which is no parameter"),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=lambda v: ascii(v)[:40])
def test_what_is_wrong_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(CommandError, match=said):
        for slug, table in toml.tables(path).items():
            toml.model(slug, table)


def imaged(*command: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_file_is_taken_over_and_what_is_unchanged_is_not_loaded_again(tmp_path: Path) -> None:
    table = f'[model.own]\ncheckpoint = "{MICRO}"\ntitle = "Own"\n'
    written(tmp_path, table)
    assert "own is served from" in imaged("models", "sync", "--data", tmp_path)
    assert imaged("models", "sync", "--data", tmp_path) == "own is as it was\n"
    toml.tables.cache_clear()
    written(tmp_path, table + "price = 0.5\n")
    assert "own is served from" in imaged("models", "sync", "--data", tmp_path)
    shown = imaged("models", "show", "own", "--data", tmp_path)
    assert "own: Own" in shown and "price: 0.500000 USD" in shown and "SHA-256: " in shown
    listed = imaged("models", "list", "--data", tmp_path)
    assert "own" in listed and "UNLOADED" in listed


def test_an_added_model_keeps_what_comes_with_its_slug(tmp_path: Path) -> None:
    add = ("models", "add", DEFAULT_SLUG, "--checkpoint", MICRO, "--data", tmp_path)
    said: dict[str, Any] = {"--licence": "Mine.", "--price": "0.25"}
    imaged(*add, *(word for pair in said.items() for word in pair))
    shown = imaged("models", "show", DEFAULT_SLUG, "--data", tmp_path)
    assert "Yamer's Realistic SDXL" in shown and "licence: Mine." in shown and "0.250000" in shown


def test_a_digest_in_the_file_is_held_to(tmp_path: Path) -> None:
    table = f'[model.own]\ncheckpoint = "{MICRO}"\n'
    written(tmp_path, table + f'sha256 = "{"0" * 64}"\n')
    result = CliRunner().invoke(main, ["models", "sync", "--data", str(tmp_path)])
    assert result.exit_code == 1 and "is not the file that was added" in result.output
    toml.tables.cache_clear()
    found = load(MICRO).sha256
    written(tmp_path, table + f'sha256 = "{found}"\n')
    assert "own is served from" in imaged("models", "sync", "--data", tmp_path)
    assert imaged("models", "sync", "--data", tmp_path) == "own is as it was\n"


def test_a_table_without_files_leaves_those_that_were_added(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(MICRO, tmp_path / "copy"))
    imaged("models", "add", DEFAULT_SLUG, "--checkpoint", copy, "--data", tmp_path)
    written(tmp_path, f'[model."{DEFAULT_SLUG}"]\nprice = 0.5\n')
    imaged("models", "sync", "--data", tmp_path)
    shown = imaged("models", "show", DEFAULT_SLUG, "--data", tmp_path)
    assert str(copy) in shown and "0.500000" in shown


def test_a_default_of_loras_can_be_listed(tmp_path: Path) -> None:
    text = '[model.x.parameters]\nloras = { default = [{name = "ink", weight = 0.5}] }\n'
    [(slug, table)] = toml.tables(written(tmp_path, text)).items()
    [knob] = [knob for knob in toml.model(slug, table).knobs if knob.name == "loras"]
    assert json.dumps(plain(knob.default)) == '[{"name": "ink", "weight": 0.5}]'


def test_the_documents_example_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    [block] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    [(slug, table)] = toml.tables(written(tmp_path, block)).items()
    assert (slug, toml.model(slug, table).price_micros) == ("portraits", 10_000)


HAS, HAS_NOT = (Cpu(frozenset({flag}), "AVX512") for flag in ("avx512_bf16", "avx512_f"))


@pytest.mark.parametrize(
    ("cpu", "has"),
    [
        (HAS, True),
        (HAS_NOT, False),
        (replace(HAS, flags=frozenset({"amx_bf16", "amx_tile"})), True),
        (replace(HAS, flags=frozenset({"bf16"})), False),  # an ARM: nobody has measured it
        (replace(HAS, own="AVX2"), False),
        (replace(HAS, products="AVX512_CORE"), False),
        (replace(HAS, products="avx2"), False),
        (replace(HAS, products="AVX512_CORE_BF16"), True),
        (replace(HAS, products="AVX512_CORE_AMX"), True),
    ],
)
def test_a_cpu_that_has_bfloat16(cpu: Cpu, has: bool) -> None:
    assert cpu.has_bf16 is has
    assert cpu_dtype(MIN_BF16_PARAMETERS, cpu)[0] == ("bf16" if has else "fp32")
    assert cpu_dtype(MIN_BF16_PARAMETERS - 1, cpu)[0] == "fp32"


def test_this_cpu_can_be_asked() -> None:
    assert isinstance(Cpu.here().has_bf16, bool)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        assert Cpu.here({name: "AVX2"}).products == "AVX2"
        assert not Cpu.here({name: "AVX2"}).has_bf16


class Added:
    """`imaged models` on a folder of its own, on a CPU of one's choice."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        patch.setattr("imaged.engine.cpu.MIN_BF16_PARAMETERS", 1)
        patch.setattr("imaged.engine.loading.load.best_device", lambda: torch.device("cpu"))
        self.checkpoint = shutil.copytree(MICRO, folder / "copy")

    def models(self, cpu: Cpu, *args: str) -> str:
        self.patch.setattr(Cpu, "here", lambda: cpu)
        done = CliRunner().invoke(main, ["models", *args, "--data", str(self.folder / "data")])
        assert done.exit_code == 0, done.output
        return done.output

    def add(self, cpu: Cpu, slug: str, *options: str) -> str:
        return self.models(cpu, "add", slug, "--checkpoint", str(self.checkpoint), *options)

    def sync(self, cpu: Cpu, said: str) -> str:
        toml.tables.cache_clear()
        return self.models(cpu, "sync", str(written(self.folder, said)))

    def held(self, slug: str) -> tuple[str, str]:
        """dtype and cpu_dtype of a model, as they are kept."""
        database = Database(f"sqlite:///{self.folder / 'data' / 'imaged.db'}")
        with database.read() as connection:
            weights = catalogue.catalogue(connection)[slug].weights
        database.close()
        return weights.dtype, weights.cpu_dtype


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Added:
    return Added(tmp_path, monkeypatch)


def test_what_suits_a_cpu_is_found_when_a_model_is_added(added: Added) -> None:
    assert "in bf16, the VAE fp32: this CPU computes in bfloat16 itself" in added.add(HAS, "new")
    assert added.held("new") == ("", "bf16")
    assert "dtype on a CPU: bf16, the VAE fp32\n" in added.models(HAS_NOT, "show", "new")
    assert "in fp32: this CPU does not compute in bfloat16" in added.add(HAS_NOT, "without")
    assert added.held("without") == ("", "fp32")
    assert "dtype fp32" not in added.add(HAS, "said", "--dtype", "fp32")
    assert added.held("said") == ("fp32", "")
    assert added.held("micro") == ("", "")


def test_and_stays_while_the_files_are_the_same(added: Added) -> None:
    """Also for models of before it was asked: float32 then."""
    own = f'[model.own]\ncheckpoint = "{added.checkpoint}"\n'
    assert "own is served from" in added.sync(HAS, own) and added.held("own") == ("", "bf16")
    assert added.sync(HAS_NOT, own) == "own is as it was\n"
    added.sync(HAS_NOT, f"{own}price = 0.5\n")
    assert added.held("own") == ("", "bf16")
    added.sync(HAS_NOT, f'{own}dtype = "fp32"\n')
    assert added.held("own") == ("fp32", "")
    added.sync(HAS_NOT, own)
    assert added.held("own") == ("", "fp32")
    database = Database(f"sqlite:///{added.folder / 'data' / 'imaged.db'}")
    with database.write() as connection:
        before = {k: v for k, v in catalogue.tables(connection)["own"].items() if k != "cpu_dtype"}
        catalogue.add(connection, "own", before, 0.0)
    database.close()
    assert added.sync(HAS, own) == "own is as it was\n"
    added.sync(HAS, f"{own}price = 0.25\n")
    assert added.held("own") == ("", "")
    added.sync(HAS, "[model.alias]\nprice = 0.25\n")
    assert added.held("alias") == ("", "")
