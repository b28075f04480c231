"""The largest job stays within its bound: four pictures of 2048 x 2048.

The bound for micro: 2.25 GiB for the process, and for each picture under way 1 MiB more for each
UNet call and for each noise that its sampler draws (what it may look back on). In a process of its
own, whose peak the kernel reports.

It ends with the first picture, beside which the other three are under way. All four:
    MEMORY_PICTURES=4 python -m pytest tests/golden/test_memory.py -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

PICTURES = int(os.environ.get("MEMORY_PICTURES", "1"))
BOUND = 2.25 * 1024**3
PROGRAM = """
import json, resource, sys
from imaged.catalogue.model import MICRO
from imaged.engine.engine import Engine
from imaged.engine.loading.load import load
from imaged.params.image_params import ImageParams

engine = Engine(load(MICRO))
steps = {"num_inference_steps": 1, "scheduler": "Euler"}
large = {"img_width": 2048, "img_height": 2048}
job = ImageParams("a red house", samples=4, seed=1, **steps, **large)
engine.submit("x", job)
engine.tick()
made = engine.jobs["x"].pictures
while len(made) < int(sys.argv[1]):
    engine.tick()
sizes = [(p.width, p.height, len(p.rgb)) for p in made.values()]
print(json.dumps([sizes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


@pytest.mark.slow
def test_four_of_the_largest_pictures_stay_within_the_bound() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(PICTURES)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sizes, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {peak / 1024**3:.2f} GiB")
    assert sizes == [[2048, 2048, 3 * 2048 * 2048]] * PICTURES
    assert peak <= BOUND
