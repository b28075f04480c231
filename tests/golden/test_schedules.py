"""The timesteps and sigmas that are told of a schedule, against the reference's."""

from __future__ import annotations

import pytest

from imaged.catalogue.model import MICRO, Weights
from imaged.checkpoint_info.explain import Explainer
from imaged.sampling.schedulers import SCHEDULERS
from tests.oracle import build_scheduler


@pytest.mark.parametrize("steps", [20, 25, 50, 100])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_the_reference_s(name: str, steps: int) -> None:
    """Its own timesteps and sigmas, where its class has one for each step."""
    explainer = Explainer.of(Weights(MICRO))
    ours, theirs = (
        explainer.scheduler(name, "diffusers", steps),
        build_scheduler(name, explainer.config),
    )
    theirs.set_timesteps(steps)
    assert len(ours["timesteps"]) == steps == len(ours["sigmas"]) - 1
    if len(theirs.timesteps) == steps:
        assert ours["timesteps"] == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
        sigmas = getattr(theirs, "sigmas", None)
        if sigmas is not None:
            assert ours["sigmas"] == pytest.approx(sigmas.tolist(), rel=1e-5, abs=1e-6)
    else:  # Heun and DPM2 tell of both calls of a step, PNDM of its first one twice
        assert set(ours["timesteps"]) <= {round(t, 4) for t in theirs.timesteps.tolist()}
