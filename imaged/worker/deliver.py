"""Writes an outcome to the store, in the delivery thread: checks, encodes and keeps the images,
then completes and charges the job in one transaction.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future, wait
from dataclasses import asdict, dataclass
from typing import Any

from imaged import __version__
from imaged.catalogue.model import Weights
from imaged.checkpoint_info.explain import Explainer, reports
from imaged.engine.decode import Picture
from imaged.engine.outcome import Outcome
from imaged.engine.snapshot import Provenance
from imaged.errors import ImagedError, JobFailed
from imaged.jobs import Job
from imaged.params.image_params import ImageParams
from imaged.provenance.receipts import picture_of, request_of, sign, written
from imaged.settings import Settings
from imaged.store.accounts import keys
from imaged.store.blobs import Blobs
from imaged.store.jobs import drafts, queue
from imaged.store.sql.database import Database
from imaged.worker.encode import encode_jpeg, encode_png, with_comment
from imaged.worker.image_checker import judge, load_check

log = logging.getLogger(__name__)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
Receipt = dict[str, Any] | None


@dataclass(frozen=True)
class Stamp:
    """What results say made an image; determinism: the class that was asked for (decision 13)."""

    checkpoint: str
    determinism: str
    device: str


class Delivery:
    """Writes outcomes in one worker's name; runs in the delivery thread."""

    def __init__(self, db: Database, blobs: Blobs, worker_id: str, settings: Settings) -> None:
        self._db, self._blobs = db, blobs
        self._worker_id, self._retention_s = worker_id, settings.retention_s
        self._embeddings = settings.embeddings_folder
        self._check = load_check(settings.checker)
        self._signer = keys.load_signer(settings.data)
        self._embedded = settings.receipts == "embedded"

    def deliver(
        self, job: Job, outcome: Outcome, stamp: Stamp, weights: Weights | None = None
    ) -> None:
        """Complete, park or fail the job as the outcome says, unless another worker has it by now.

        weights: for the report of how its prompts were tokenized, if it was asked for.
        """
        if outcome.error is not None:
            self.fail(job, outcome.error)
            return
        receipts = [self._receipt(job, picture, outcome, stamp) for picture in outcome.pictures]
        try:
            files = [
                self._encoded(job, picture, receipt, stamp)
                for picture, receipt in zip(outcome.pictures, receipts, strict=True)
            ]
        except JobFailed as refusal:  # of any picture, before one of them is written
            self.fail(job, refusal)
            return
        try:
            images = self._keep(job, outcome, files)
        except OSError as error:
            log.error("job %s: its pictures cannot be kept: %s", job.id, error)
            self.fail(job, _storage_failure(error))
            return
        for image, receipt in zip(images, receipts, strict=True):
            image.update({"receipt": receipt} if receipt else {})
        result = {"images": images, **self._facts(job, outcome, stamp, weights)}
        if self._write(job, outcome, result):
            if not outcome.snapshots:
                self._blobs.delete_snapshots_of(job.id)
            return
        log.info("job %s moved on while its picture was made", job.id)
        self._drop(images)
        self.tidy(job)

    def _facts(
        self, job: Job, outcome: Outcome, stamp: Stamp, weights: Weights | None
    ) -> dict[str, Any]:
        """The fields of a result beside its images."""
        return {
            "inference_s": round(outcome.inference_s, 6),
            **asdict(stamp),
            **({"determinism": "close"} if job.draft and job.draft.varied else {}),
            "engine": __version__,
            "dtype": outcome.provenance.dtype if outcome.provenance else None,
            "checked": self._check is not None,
            **self._reports(job, weights),
        }

    def _write(self, job: Job, outcome: Outcome, result: dict[str, Any]) -> bool:
        """Complete or park the job; False if this worker holds it no more."""
        facts, calls = (job, self._worker_id, result), outcome.calls
        with self._db.write() as connection:
            now = time.time()
            if outcome.snapshots:
                return drafts.park(connection, *facts, calls, now, self._retention_s)
            return queue.finish(connection, *facts, now, self._retention_s)

    def _reports(self, job: Job, weights: Weights | None) -> dict[str, Any]:
        """The prompt report, if it was asked for; an error in it costs no image."""
        if weights is None or not job.params.prompt_report:
            return {}
        try:
            reader = Explainer.of(weights, self._embeddings).reader
            return {"prompts": reports(reader, job.params)}
        except Exception:  # whatever it is
            log.exception("job %s: no report of its prompts", job.id)
            return {}

    def fail(self, job: Job, error: ImagedError) -> None:
        with self._db.write() as connection:
            mine = (job, self._worker_id, error.code, error.detail)
            queue.fail(connection, *mine, time.time(), self._retention_s)
        self.tidy(job)

    def tidy(self, job: Job) -> None:
        """Delete the snapshots of a job that has ended, or is deleted."""
        with self._db.read() as connection:
            current = queue.read(connection, [job.id]).get(job.id)
        if current is None or current.state.final:
            self._blobs.delete_snapshots_of(job.id)

    def _encoded(self, job: Job, picture: Picture, receipt: Receipt, stamp: Stamp) -> bytes:
        """The content of an image's file, once the image checker has passed it; raises JobFailed if
        it does not.
        """
        png = job.params.output_format == "png"
        embedded = written(receipt) if receipt and self._embedded else ""
        if not png or self._check:
            jpeg = encode_jpeg(picture)
            judge(self._check, picture, jpeg)
        if png:
            return encode_png(picture, job.params, stamp.checkpoint, embedded)
        return with_comment(jpeg, embedded)

    def _receipt(self, job: Job, picture: Picture, outcome: Outcome, stamp: Stamp) -> Receipt:
        """The signed receipt; None for the estimates of a draft."""
        if outcome.provenance is None or outcome.snapshots:
            return None
        varied = job.draft is not None and job.draft.varied
        facts = facts_of(job.params, job.model, picture, outcome.provenance, stamp, varied)
        return sign(facts, self._signer)

    def _keep(self, job: Job, outcome: Outcome, files: list[bytes]) -> list[dict[str, Any]]:
        """Write all files of a job or, on an error, none; raises OSError."""
        images: list[dict[str, Any]] = []
        try:
            for k, snapshot in enumerate(outcome.snapshots):
                self._blobs.put(f"{job.id}-{job.epoch}-{k}.state", snapshot)
            for k, (picture, content) in enumerate(zip(outcome.pictures, files, strict=True)):
                name = f"{job.id}-{job.epoch}-{k}.{job.params.output_format}"
                facts = {"name": name, "seed": picture.seed, "bytes": len(content)}
                images.append({**facts, "width": picture.width, "height": picture.height})
                self._blobs.put(name, content)
        except OSError:
            self._drop(images)
            if outcome.snapshots:
                self._blobs.delete_snapshots_of(job.id)
            raise
        return images

    def _drop(self, images: list[dict[str, Any]]) -> None:
        for image in images:
            self._blobs.delete(str(image["name"]))


class Deliveries:
    """Outcomes on their way to the store. writing: the delivery thread, so that the worker's loop
    does not wait for files and commits.
    """

    def __init__(self, delivery: Delivery, writing: Executor) -> None:
        self._delivery, self._writing = delivery, writing
        self._jobs: dict[Future[None], Job] = {}

    @property
    def jobs(self) -> Collection[Job]:
        """Those whose outcomes are not delivered yet."""
        return self._jobs.values()

    def deliver(self, job: Job, outcome: Outcome, stamp: Stamp, weights: Weights) -> None:
        future = self._writing.submit(self._delivery.deliver, job, outcome, stamp, weights)
        self._jobs[future] = job

    def tidy(self, job: Job) -> None:
        self._writing.submit(self._delivery.tidy, job)

    def collect(self, wait_s: float = 0.0) -> bool:
        """Forget what was delivered; true if there was something. Raises what delivery raised.

        wait_s: seconds to wait for all that is under way.
        """
        if wait_s:
            wait(self._jobs, wait_s)
        done = [future for future in self._jobs if future.done()]
        for future in done:
            del self._jobs[future]
            future.result()
        return bool(done)


def _storage_failure(error: OSError) -> JobFailed:
    """The failure of a job whose files could not be written."""
    if error.errno in NO_ROOM:
        return JobFailed("storage_full", "the server has no room for more pictures")
    return JobFailed("storage_failed", "the server could not keep the picture")


def facts_of(
    params: ImageParams,
    model: str,
    picture: Picture,
    provenance: Provenance,
    stamp: Stamp,
    varied: bool = False,
) -> dict[str, Any]:
    """The facts of an image's receipt. varied: the request changed at a draft."""
    return {
        "model": model,
        "request": request_of(params, picture.seed),
        "checkpoint": stamp.checkpoint,
        "checkpoint_sha256": provenance.checkpoint,
        "table_sha256": provenance.table,
        "loras": provenance.loras,
        "engine": provenance.engine,
        "device": stamp.device,
        "dtype": provenance.dtype,
        "determinism": "close" if varied else provenance.determinism,
        "varied": varied,
        "picture": picture_of(picture.rgb, picture.width, picture.height),
    }
