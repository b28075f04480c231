"""What a finished job gave: the server's body, and its pictures as images or files."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from imaged.client import calls

if TYPE_CHECKING:
    from PIL import Image


class Result(dict[str, Any]):
    """The result body, a plain dictionary, that can also fetch its pictures.

    The links in it need no key, so none is sent to them.
    """

    def contents(self) -> list[bytes]:
        """The files' bytes, in order; raises ImagedError when a link has expired."""
        return fetched(self._entries)

    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return [opened(content) for content in fetched(self._entries)]

    def save(self, path: str | Path) -> list[Path]:
        """Write the pictures and return their paths.

        A folder takes each under its own name; of several pictures, `house.jpg` makes
        `house-0.jpg`, `house-1.jpg`. The format is the server's, whatever the ending says.
        """
        paths = self.paths(Path(path))
        for target, content in zip(paths, fetched(self._entries), strict=True):
            target.write_bytes(content)
        return paths

    def paths(self, path: Path) -> list[Path]:
        """Where `save` writes."""
        if path.is_dir():
            return [path / Path(entry["file_name"]).name for entry in self._entries]
        if len(self._entries) == 1:
            return [path]
        return [path.with_stem(f"{path.stem}-{k}") for k in range(len(self._entries))]

    @property
    def _entries(self) -> list[dict[str, Any]]:
        return list(self.get("images", []))


class AsyncResult(Result):
    """The same, for code that must not block."""

    async def contents(self) -> list[bytes]:  # type: ignore[override]
        return await asyncio.to_thread(super().contents)

    async def images(self) -> list[Image.Image]:  # type: ignore[override]
        return await asyncio.to_thread(super().images)

    async def save(self, path: str | Path) -> list[Path]:  # type: ignore[override]
        return await asyncio.to_thread(super().save, path)


def fetched(entries: list[dict[str, Any]]) -> list[bytes]:
    """The pictures' files, which came with the body as base64 or are fetched."""
    with calls.answered(), httpx.Client(transport=calls.transport()) as http:
        return [
            base64.b64decode(entry.get("base64") or "") or content_of(http.get(entry["url"]))
            for entry in entries
        ]


def content_of(response: httpx.Response) -> bytes:
    if not response.is_success:
        raise calls.problem(response)
    return response.content


def opened(content: bytes) -> Image.Image:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image
