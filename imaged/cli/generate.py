"""imaged generate"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from imaged.catalogue import DEFAULT_SLUG, Model
from imaged.cli.app import data_option, find_model, main
from imaged.errors import CommandError
from imaged.gateway.rules import REFUSAL, Rules
from imaged.params import KNOBS, ImageParams, Knob, read_params
from imaged.settings import Settings


def knob_option(knob: Knob) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command-line option from a knob; values are checked by the knob, as in the API."""
    names = {
        "negative_prompt": "negative",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "img_width": "width",
        "img_height": "height",
    }
    shown = "" if knob.default is None else f", default {knob.default}"
    text = f"{knob.text.rstrip('.')} ({knob.allowed}{shown})."
    flag = f"--{names.get(knob.name, knob.name)}"
    return click.option(flag, knob.name, metavar=knob.kind.upper(), help=text)


def knob_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for knob in reversed(KNOBS):
        if knob.name not in ("prompt", "base64", "output_format", "prompt_report", "loras"):
            command = knob_option(knob)(command)
    return command


@main.command()
@click.argument("prompt")
@knob_options
@click.option("--model", default=DEFAULT_SLUG, show_default=True, help="Slug from `models list`.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write (.jpg or .png)  [default: imaged-SEED.jpg]",
)
@data_option
def generate(prompt: str, model: str, output: Path | None, data: Path | None, **given: Any) -> None:
    """Make pictures in this process, without a server. Prints each file and its seed."""
    chosen = find_model(model, data)
    params, _ = read_params({"prompt": prompt, **given}, chosen.knobs)
    if params.seed < 0:
        params = replace(params, seed=secrets.randbelow(10**9))
    if output is not None and output.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise CommandError("--output should end in .jpg, .jpeg or .png")
    if output is not None and not output.parent.is_dir():
        raise CommandError(f"--output: there is no folder {output.parent}")
    rules = Rules.load(Settings.from_env(os.environ).rules)
    if any(rules.judge(text) for text in params.said()):
        raise CommandError(REFUSAL)
    _generate(params, chosen, output, Settings.from_env(os.environ, data=data))


def _generate(params: ImageParams, model: Model, output: Path | None, settings: Settings) -> None:
    from tqdm import tqdm

    from imaged.worker.supervisor import waiting

    os.environ.update(waiting(1, 0, os.environ))  # before torch, which reads it once
    from imaged.engine.engine import Engine
    from imaged.engine.load import load
    from imaged.worker.deliver import encode_jpeg, encode_png

    click.echo(f"checkpoint {model.checkpoint_name}", err=True)
    engine = Engine(
        load(model.weights),
        previews=False,
        loras=settings.loras_folder,
        embeddings=settings.embeddings_folder,
    )
    engine.submit("cli", params)
    outcomes: list[Any] = []
    calls = params.unet_calls * params.samples
    with tqdm(total=calls, unit="call", desc="denoising") as bar:
        while not outcomes:
            outcomes = engine.tick()
            progress = engine.progress().get("cli")
            bar.update((progress.calls if progress else calls) - bar.n)
    outcome = outcomes[0]
    if outcome.error is not None:
        raise outcome.error
    for k, picture in enumerate(outcome.pictures):
        path = _output_path(output, picture.seed, k, len(outcome.pictures))
        if path.suffix.lower() == ".png":
            path.write_bytes(encode_png(picture, params, model.checkpoint_name))
        else:
            path.write_bytes(encode_jpeg(picture))
        click.echo(f"{path}  seed {picture.seed}")


def _output_path(output: Path | None, seed: int, k: int, count: int) -> Path:
    if output is None:
        return Path(f"imaged-{seed}.jpg")
    return output if count == 1 else output.with_stem(f"{output.stem}-{k}")
