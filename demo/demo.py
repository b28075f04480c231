"""Start the server, send its model's sample request through the vendor's SDK, save demo.jpg, stop.

make demo
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from segmind import SegmindClient
from tqdm import tqdm

from imaged.catalogue import toml
from imaged.catalogue.model import DEFAULT_SLUG

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "build" / "demo"
PICTURE = ROOT / "demo.jpg"


def main() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print(f"starting imaged at {url}")
    DATA.mkdir(parents=True, exist_ok=True)
    log = (DATA / "server.log").open("ab")
    server = subprocess.Popen(
        [sys.executable, "-m", "imaged", "serve", "--data", str(DATA), "--port", str(port)],
        stdout=log,
        stderr=log,
        env={**os.environ, "IMAGED_DRAIN_S": "1"},  # nobody waits for a picture given up
    )
    try:
        wait_until_ready(server, url)
        make_picture(url)
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def make_picture(url: str) -> None:
    """What a user of the vendor's SDK writes, with its own base URL and a progress bar."""
    key = (DATA / "first-key").read_text().strip()
    client = SegmindClient(api_key=key, base_url=f"{url}/v1")
    body = toml.built_in()[DEFAULT_SLUG].sample
    start = time.monotonic()
    job = client.submit_async(DEFAULT_SLUG, **body)
    print(f"submitted {job.request_id} to {DEFAULT_SLUG}")
    with tqdm(total=body["num_inference_steps"], unit="step", desc="denoising") as bar:
        while (status := job.status())["status"] not in ("COMPLETED", "FAILED"):
            bar.update(status.get("step", 0) - bar.n)
            time.sleep(0.25)
        bar.update(bar.total - bar.n)
    result = job.wait()
    PICTURE.write_bytes(httpx.get(result["output"]).raise_for_status().content)
    image, metrics = result["images"][0], result["metrics"]
    total = time.monotonic() - start
    print(f"""
{os.path.relpath(PICTURE)}   {image["width"]} x {image["height"]}
seed        {image["seed"]}
time        {total:.1f} s, {metrics["inference_time"]:.1f} s of it inference
cost        {metrics["cost"]:.6f} USD of this server's own credits
checkpoint  {result["checkpoint"]}, the small one that comes with imaged
next        make serve, see "First steps" in README.md; your own SDXL checkpoint:
            .venv/bin/imaged models add {DEFAULT_SLUG} --checkpoint PATH""")


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            sys.exit(f"the server ended: see {DATA / 'server.log'}")
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    sys.exit(f"the server was not ready after two minutes: see {DATA / 'server.log'}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    main()
