"""An outcome to the store: picture files first, then the row with the charge."""

from __future__ import annotations

import io
import logging
import time

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imaged.engine.decode import Picture
from imaged.engine.engine import Outcome
from imaged.errors import ImagedError
from imaged.infotext import infotext
from imaged.jobs import Job
from imaged.params import ImageParams
from imaged.settings import Settings
from imaged.store import queue
from imaged.store.blobs import Blobs
from imaged.store.db import Database

log = logging.getLogger(__name__)

JPEG_QUALITY = 95


class Delivery:
    """Brings outcomes to the store in one worker's name."""

    def __init__(self, db: Database, blobs: Blobs, worker_id: str, settings: Settings) -> None:
        self._db, self._blobs = db, blobs
        self._worker_id, self._retention_s = worker_id, settings.retention_s

    def deliver(self, job: Job, outcome: Outcome, checkpoint: str) -> None:
        """Completed or failed, exactly as the outcome says, unless the job is ours no more."""
        if outcome.error is not None:
            self.fail(job, outcome.error)
            return
        images = [
            self._keep(job, k, picture, checkpoint) for k, picture in enumerate(outcome.pictures)
        ]
        result = {
            "images": images,
            "inference_s": round(outcome.inference_s, 6),
            "checkpoint": checkpoint,
        }
        with self._db.write() as connection:
            held = queue.finish(
                connection, job, self._worker_id, result, time.time(), self._retention_s
            )
        if not held:
            self._drop([str(image["name"]) for image in images], job)

    def fail(self, job: Job, error: ImagedError) -> None:
        with self._db.write() as connection:
            queue.fail(
                connection,
                job,
                self._worker_id,
                error.code,
                error.detail,
                time.time(),
                self._retention_s,
            )

    def _keep(self, job: Job, k: int, picture: Picture, checkpoint: str) -> dict[str, int | str]:
        name = f"{job.id}-{job.epoch}-{k}.{job.params.output_format}"
        png = job.params.output_format == "png"
        content = encode_png(picture, job.params, checkpoint) if png else encode_jpeg(picture)
        self._blobs.put(name, content)
        return {
            "name": name,
            "seed": picture.seed,
            "bytes": len(content),
            "width": picture.width,
            "height": picture.height,
        }

    def _drop(self, names: list[str], job: Job) -> None:
        log.info("job %s moved on while its picture was made", job.id)
        for name in names:
            self._blobs.delete(name)


def encode_jpeg(picture: Picture) -> bytes:
    """JPEG at quality 95 without chroma subsampling; the same pixels give the same bytes."""
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def encode_png(picture: Picture, params: ImageParams, checkpoint: str) -> bytes:
    """PNG with the parameters in a text chunk, as A1111 writes them."""
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.rgb)
    text = PngInfo()
    text.add_text("parameters", infotext(params, picture.seed, checkpoint))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()
