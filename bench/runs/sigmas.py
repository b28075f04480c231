"""Where the schedulers step, as a picture for docs/prompts-and-schedulers.md."""

from __future__ import annotations

from pathlib import Path

import click

from bench.app import main
from imaged.catalogue.model import MICRO, Weights
from imaged.checkpoint_info.explain import Explainer
from imaged.sampling.schedulers import IN_A1111, SCHEDULERS

STEPS = 25
COLOURS = {"diffusers": "tab:blue", "a1111": "tab:orange"}


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("docs/pictures/sigmas.png"),
    show_default=True,
)
def sigmas(out: Path) -> None:
    """Draw each scheduler's noise levels at 25 steps, in both profiles, on SDXL's config."""
    from matplotlib.figure import Figure

    explainer = Explainer.of(Weights(MICRO))
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    axes = list(figure.subplots(2, 7, sharex=True, sharey=True).flat)
    for name, one in zip(SCHEDULERS, axes, strict=False):
        for profile, colour in COLOURS.items():
            if profile == "a1111" and name not in IN_A1111:
                continue
            levels = explainer.scheduler(name, profile, STEPS)["sigmas"][:-1]
            one.plot(range(1, STEPS + 1), levels, ".-", color=colour, label=profile, markersize=4)
        one.set_title(name, fontsize=10)
        one.set_yscale("log")
        one.grid(alpha=0.3)
    axes[-1].set_axis_off()
    axes[-1].legend(*axes[SCHEDULERS.index("Euler")].get_legend_handles_labels(), loc="center")
    figure.supxlabel("step")
    figure.supylabel("sigma")
    figure.savefig(out, dpi=80, metadata={"Software": None})
    click.echo(out)
