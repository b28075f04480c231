"""imaged explain"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from imaged.catalogue.model import DEFAULT_SLUG
from imaged.cli.app import data_option, find_model, main
from imaged.cli.generate import knob_options, read_options
from imaged.jobs import price_micros
from imaged.moderation.rules import texts_to_judge
from imaged.params.image_params import ImageParams
from imaged.settings import Settings

WIDE, HIGH = 72, 15  # of the plot, in characters
WORD_END = "</w>"


@main.command()
@click.argument("prompt")
@knob_options
@click.option("--model", default=DEFAULT_SLUG, show_default=True, help="Slug from `models list`.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, with every number.")
@data_option
def explain(prompt: str, model: str, as_json: bool, data: Path | None, **given: Any) -> None:
    """Say how a prompt would be read. No picture is made.

    Also where the scheduler would step. Tokens stand as the text encoders get them: parts of one
    word are joined by "+", a weight other than 1 follows its token.
    """
    from imaged.checkpoint_info.explain import Explainer, reports, warnings

    chosen = find_model(model, data)
    params = read_options(prompt, given, chosen)
    texts_to_judge(params)  # refuses prompts that change too often
    folder = Settings.from_env(os.environ, data=data).embeddings_folder
    explainer = Explainer.of(chosen.weights, folder)
    told = reports(explainer.reader, params)
    scheduler = explainer.scheduler(
        params.scheduler, params.scheduler_profile, params.num_inference_steps
    )
    said = warnings(params, told)
    if as_json:
        found = {"scheduler": scheduler, "prompts": told, "warnings": said}
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    click.echo(f"checkpoint {chosen.checkpoint_name}, ${price_micros(chosen, params) / 1e6:.6f}")
    click.echo("\n".join(["", *_prompt("prompt", told["prompt"])]))
    if told["negative_prompt"] is not None:
        click.echo("\n".join(["", *_prompt("negative_prompt", told["negative_prompt"])]))
    click.echo("\n".join(["", *_schedule(scheduler, params)]))
    for warning in said:
        click.secho(f"warning: {warning}", fg="yellow")


def _prompt(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    yield click.style(name, bold=True) + f", dialect {report['dialect']}"
    for text in report["texts"]:
        first, second = text["encoders"]
        if len(report["texts"]) > 1:
            yield f"  at {_steps(text['steps'])}"
        same = first == second
        for number, encoder in enumerate([first] if same else [first, second], start=1):
            which = "both encoders" if same else f"encoder {number}"
            yield f"  {which}: {encoder['tokens']} token{'s' * (encoder['tokens'] != 1)}"
            for window in encoder["windows"]:
                yield f"    {len(window['tokens']):2} of 75  {_tokens(window)}"
    found, missing = report["embeddings"]["found"], report["embeddings"]["missing"]
    if found:
        yield "  textual inversions: " + ", ".join(f"{n} ({v} vectors)" for n, v in found.items())
    if missing:
        yield "  read as words, no textual inversion has the name: " + ", ".join(missing)
    for c in report["characters"]:
        shown = c["character"] if c["character"].isprintable() else ""
        yield f"  {shown:1} {c['code_point']} {c['name']}, {c['count']}x, read as {c['read_as']}"


def _tokens(window: Mapping[str, Any]) -> str:
    """The tokens of a window in one line."""
    line = ""
    for token, weight in zip(window["tokens"], window["weights"], strict=True):
        whole = token.endswith(WORD_END) or ", vector " in token
        shown = token.removesuffix(WORD_END)
        if weight != 1:
            colour = "green" if weight > 1 else "blue"
            shown = click.style(f"{shown}:{weight:g}", fg=colour)
        line += shown + (" " if whole else "+")
    return line.rstrip(" +")


def _steps(ranges: list[list[int]]) -> str:
    """Runs of steps in words."""
    parts = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges]
    return ("steps " if len(parts) > 1 or " " in parts[0] else "step ") + ", ".join(parts)


def _schedule(told: Mapping[str, Any], params: ImageParams) -> Iterator[str]:
    steps, calls = told["steps"], told["unet_calls"] * params.samples
    yield (
        f"{click.style(told['name'], bold=True)} ({told['class']}), profile {told['profile']}: "
        f"{steps} steps, {calls} UNet calls"
    )
    times, sigmas = told["timesteps"], told["sigmas"]
    yield (
        f"  timesteps {times[0]:g} to {times[-1]:g}, sigmas {sigmas[0]:g} to {sigmas[-2]:g}, then 0"
    )
    yield plot(sigmas)


def plot(sigmas: list[float]) -> str:
    """Sigma over steps, on a logarithmic scale, for a terminal."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(WIDE, HIGH)
    plotext.yscale("log")
    plotext.title("sigma")
    plotext.xlabel("step")
    plotext.xticks(sorted({1 + round(k / 4 * (len(sigmas) - 2)) for k in range(5)}))
    plotext.plot(range(1, len(sigmas)), sigmas[:-1], marker="braille")
    return "\n".join(line.rstrip() for line in click.unstyle(plotext.build()).splitlines())
