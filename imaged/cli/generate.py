"""imaged generate"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imaged.catalogue.model import DEFAULT_SLUG, Model
from imaged.cli.app import data_option, find_model, main, refuse_unwritable
from imaged.errors import BadParameter, CommandError
from imaged.moderation.rules import REFUSAL, Rules
from imaged.params.image_params import ImageParams, read_params
from imaged.params.knobs import KNOBS, Knob
from imaged.settings import Settings

if TYPE_CHECKING:
    from imaged.engine.decode import Picture
    from imaged.engine.engine import Engine
    from imaged.engine.outcome import Outcome
    from imaged.engine.snapshot import RunPlan

ENDINGS = (".jpg", ".jpeg", ".png")


#: Options whose name is not that of the API's field.
SHORT = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "img_width": "width",
    "img_height": "height",
}


def knob_option(knob: Knob) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command-line option from a knob; values are checked by the knob, as in the API."""
    shown = "" if knob.default is None else f", default {knob.default}"
    text = f"{knob.text.rstrip('.')} ({knob.allowed}{shown})."
    return click.option(_flag(knob.name), knob.name, metavar=knob.kind.upper(), help=text)


def _flag(name: str) -> str:
    return f"--{SHORT.get(name, name)}"


def read_options(prompt: str, given: Mapping[str, Any], model: Model) -> ImageParams:
    """The options' values, checked as the API's fields are; raises CommandError."""
    try:
        return read_params({"prompt": prompt, **given}, model.knobs)[0]
    except BadParameter as error:
        shown = error.field if error.field == "prompt" else _flag(error.field)
        raise CommandError(shown + error.detail.removeprefix(error.field)) from None


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
    "--draft",
    type=int,
    metavar="STEPS",
    help="Stop after so many of the steps, show what is there, and ask which to finish.",
)
@click.option(
    "--finish", metavar="LIST", help="With --draft: the answer, as in 0,2 or all or none."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write (.jpg or .png)  [default: imaged-SEED.jpg]",
)
@data_option
def generate(
    prompt: str,
    model: str,
    draft: int | None,
    finish: str | None,
    output: Path | None,
    data: Path | None,
    **given: Any,
) -> None:
    """Make pictures in this process, without a server. Prints each file and its seed.

    \b
      imaged generate "a red house by a blue lake" --seed 7 -o house.png

    With --draft the steps are those of the whole picture: one that is finished is the same, byte
    for byte, as one that never stopped.
    """
    if finish is not None and draft is None:
        raise CommandError("--finish goes with --draft")
    chosen = find_model(model, data)
    params = read_options(prompt, given, chosen)
    steps = params.num_inference_steps
    draft_steps = 0 if draft is None else _draft_steps(draft, steps)
    wanted = None if finish is None else read_choice(finish, params.samples)
    if params.seed < 0:
        params = replace(params, seed=secrets.randbelow(10**9))
    settings = Settings.from_env(os.environ, data=data)
    _check_request(params, settings)
    check_output(output, params, drafts=bool(draft_steps))
    sheet = _sheet_path(output, params.seed) if draft_steps else None
    engine = open_engine(chosen, settings)
    if sheet is None:
        write(run(engine, params), params, chosen, output, engine, settings)
        return
    from imaged.engine.snapshot import RunPlan

    drafted = run(engine, params, RunPlan(draft=draft_steps))
    write_sheet(drafted.pictures, sheet)
    many = "drafts" if params.samples > 1 else "draft"
    click.echo(f"{sheet}  {params.samples} {many} after step {draft_steps} of {steps}")
    samples = ask(params.samples) if wanted is None else wanted
    if samples:
        snapshots = dict(enumerate(drafted.snapshots))
        done = run(engine, params, RunPlan(samples=tuple(samples), snapshots=snapshots))
        write(done, params, chosen, output, engine, settings)


def _draft_steps(draft: int, steps: int) -> int:
    if not 1 <= draft < steps:
        raise CommandError(f"--draft should be a whole number between 1 and {steps - 1}")
    return draft


def check_output(output: Path | None, params: ImageParams, *, drafts: bool) -> None:
    """Raise CommandError now if a file of this job could not be written later."""
    if output is not None and output.suffix.lower() not in ENDINGS:
        raise CommandError("--output should end in .jpg, .jpeg or .png")
    seeds = range(params.seed, params.seed + params.samples)
    paths = [_output_path(output, seed, params) for seed in seeds]
    for path in [_sheet_path(output, params.seed), *paths] if drafts else paths:
        refuse_unwritable(path, "--output")


def _check_request(params: ImageParams, settings: Settings) -> None:
    """Raise CommandError now for a prompt that the rules refuse, or a LoRA that is not there."""
    if Rules.load(settings.rules).refuses(params):
        raise CommandError(REFUSAL)
    there = settings.lora_names()
    for lora in params.all_loras:
        if lora.name not in there:
            raise CommandError(
                f"there is no LoRA {lora.name} in {settings.loras_folder}; there are: "
                + (", ".join(there) or "none")
            )


def ask(count: int) -> Sequence[int]:
    """Which drafts to finish."""
    shown = ", ".join(map(str, range(count)))
    answer = click.prompt(f"Finish which? ({shown}; all; none)", default="all", err=True)
    try:
        return read_choice(answer, count)
    except CommandError as error:
        click.echo(error.detail, err=True)
        return ask(count)


def read_choice(text: str, count: int) -> Sequence[int]:
    """Indices of the chosen pictures, from a list, "all" or "none"; raises CommandError."""
    word = text.strip().lower()
    if word in ("all", "none"):
        return range(count if word == "all" else 0)
    parts = word.replace(",", " ").split()
    if not parts or any(not p.isdecimal() or int(p) >= count for p in parts):
        numbers = f"numbers from 0 to {count - 1}" if count > 1 else "0"
        raise CommandError(f"--finish should be {numbers}, all or none")
    return sorted({int(part) for part in parts})


def open_engine(model: Model, settings: Settings) -> Engine:
    from imaged.worker.openmp import waiting

    os.environ.update(waiting(1, 0, os.environ))  # before torch, which reads it once
    from imaged.engine.engine import Engine
    from imaged.engine.loading.load import load, set_threads

    set_threads(settings.threads)  # as workers do: bits may depend on it
    click.echo(f"checkpoint {model.checkpoint_name}", err=True)
    return Engine(
        load(model.weights),
        previews=False,
        loras=settings.loras_folder,
        embeddings=settings.embeddings_folder,
    )


def run(engine: Engine, params: ImageParams, resume_plan: RunPlan | None = None) -> Outcome:
    """One job under a progress bar; raises what made it fail."""
    from tqdm import tqdm

    from imaged.engine.snapshot import WHOLE

    engine.submit("cli", params, 0, resume_plan or WHOLE)
    outcomes: list[Outcome] = []
    with tqdm(total=params.unet_calls * params.samples, unit="call", desc="denoising") as bar:
        while not outcomes:
            outcomes = engine.tick()
            if progress := engine.progress().get("cli"):
                bar.total = progress.total
                bar.update(progress.calls - bar.n)
        if outcomes[0].error is not None:
            raise outcomes[0].error
        bar.update((bar.total or bar.n) - bar.n)
    return outcomes[0]


def write(
    outcome: Outcome,
    params: ImageParams,
    model: Model,
    output: Path | None,
    engine: Engine,
    settings: Settings,
) -> None:
    """Write the pictures' files, with receipts if this installation has a key to sign them."""
    from imaged.worker.encode import encode_jpeg, encode_png, with_comment

    signed = (settings.data / "receipt-key").exists() and settings.receipts == "embedded"
    sign = _signing(model, engine, settings) if signed else None
    for picture in outcome.pictures:
        path = _output_path(output, picture.seed, params)
        png = path.suffix.lower() == ".png"
        asked = replace(params, output_format="png" if png else "jpeg")
        receipt = sign(outcome, picture, asked) if sign else ""
        if png:
            path.write_bytes(encode_png(picture, asked, model.checkpoint_name, receipt))
        else:
            path.write_bytes(with_comment(encode_jpeg(picture), receipt))
        click.echo(f"{path}  seed {picture.seed}")


def _signing(
    model: Model, engine: Engine, settings: Settings
) -> Callable[[Outcome, Picture, ImageParams], str]:
    """What makes receipts, as text. It imports the store, which other pictures do without."""
    from imaged.provenance import receipts
    from imaged.store.accounts.keys import load_signer
    from imaged.worker.deliver import Stamp, facts_of

    stamp, key = Stamp(model.checkpoint_name, "exact", engine.device), load_signer(settings.data)

    def receipt(outcome: Outcome, picture: Picture, params: ImageParams) -> str:
        assert outcome.provenance is not None
        facts = facts_of(params, model.slug, picture, outcome.provenance, stamp)
        return receipts.written(receipts.sign(facts, key))

    return receipt


def write_sheet(pictures: Sequence[Picture], path: Path, side: int = 384) -> None:
    """All drafts in one picture, each with its number."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(24)
    columns = min(len(pictures), 2)
    scale = side / max(pictures[0].width, pictures[0].height)
    width, height = (round(n * scale) for n in (pictures[0].width, pictures[0].height))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + 32)), "white")
    for k, picture in enumerate(pictures):
        small = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
        at = (k % columns * width, k // columns * (height + 32))
        sheet.paste(small.resize((width, height)), (at[0], at[1] + 32))
        label = f"{k}  seed {picture.seed}"
        ImageDraw.Draw(sheet).text((at[0] + 6, at[1]), label, "black", font)
    sheet.save(path, quality=92)


def _output_path(output: Path | None, seed: int, params: ImageParams | None) -> Path:
    """The file of one picture; without params, as if it were the job's only one."""
    if output is None:
        return Path(f"imaged-{seed}.jpg")
    if params is None or params.samples == 1:
        return output
    return output.with_stem(f"{output.stem}-{seed - params.seed}")


def _sheet_path(output: Path | None, seed: int) -> Path:
    """The file of the contact sheet of all drafts."""
    path = _output_path(output, seed, None).with_suffix(".jpg")
    return path.with_stem(f"{path.stem}-draft")
