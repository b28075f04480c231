"""imaged, the image daemon: a self-hosted text-to-image service for SDXL checkpoints.

The client's names are here: `run`, `run_sync`, `submit_async`, `Client`, `AsyncClient`, `Job`,
`Event`, `models`, `generations`, `accounts`, `webhooks` and the errors. They are loaded at first
use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from imaged.errors import BadAddress, ImagedError, InferenceFailed, InferenceTimeout, NoAnswer

if TYPE_CHECKING:  # the same names for type checkers, which load nothing
    from imaged.client.account import Accounts, Generations, Models, Webhooks
    from imaged.client.aio import AsyncClient as AsyncClient
    from imaged.client.aio import AsyncJob as AsyncJob
    from imaged.client.client import Client as Client
    from imaged.client.client import Job as Job
    from imaged.client.client import SegmindClient as SegmindClient
    from imaged.client.client import run as run
    from imaged.client.client import run_sync as run_sync
    from imaged.client.client import submit_async as submit_async
    from imaged.client.events import Event as Event

    accounts: Accounts[dict[str, Any]]
    generations: Generations[dict[str, Any]]
    models: Models[dict[str, Any]]
    webhooks: Webhooks[dict[str, Any]]

__version__ = "0.1.0"

#: Names of the client, and the module of imaged.client that has each.
_CLIENT = {
    **dict.fromkeys(("AsyncClient", "AsyncJob"), "aio"),
    **dict.fromkeys(("Client", "Job", "SegmindClient"), "client"),
    "Event": "events",
    **dict.fromkeys(("run", "run_sync", "submit_async"), "client"),
}

_GROUPS = ("accounts", "generations", "models", "webhooks")  # of the default client

SegmindError = ImagedError  # the vendor's name, so that `import imaged as segmind` runs its code

__all__ = [
    *_CLIENT,
    *_GROUPS,
    "BadAddress",
    "ImagedError",
    "InferenceFailed",
    "InferenceTimeout",
    "NoAnswer",
    "SegmindError",
    "__version__",
]


def _load(name: str) -> Any:
    if name in _CLIENT:
        return getattr(import_module(f"imaged.client.{_CLIENT[name]}"), name)
    if name in _GROUPS:
        return getattr(import_module("imaged.client.client").default(), name)
    raise AttributeError(name)


if not TYPE_CHECKING:  # to a type checker every name would be there, and be Any
    __getattr__ = _load
