"""How this process is set up; the only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imaged.errors import CommandError

MAX_WORKERS = 64
#: Settings that are one of two words.
CHOICES = {
    "determinism": ("exact", "close"),
    "receipts": ("embedded", "results"),
    "graphs": ("on", "off"),
}


@dataclass(frozen=True)
class Settings:
    """Every setting, with the embedded default: one folder, nothing else."""

    data: Path = Path("data")
    database_url: str = ""  # empty: SQLite in the data folder
    blobs_url: str = ""  # empty: files in the data folder
    public_url: str = ""  # empty: each request's own origin
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    slots: int = 4  # jobs that one worker runs at a time
    threads: int = 0  # of torch; 0 leaves its choice
    memory_gb: float = 0.0  # of one worker's weights; 0: half of what the device has for each
    idle_s: float = 0.0  # a checkpoint that nobody has asked for so long leaves; 0: never
    patience_s: float = 15.0  # a job whose checkpoint is not loaded waits so long for others' jobs
    graphs: str = "off"  # or "on": CUDA graphs, see engine/nets/cuda_graphs.py
    determinism: str = "exact"  # or "close": calls of any number of rows, the last bits may differ
    receipts: str = "embedded"  # in picture files too; or "results": in results alone
    retention_s: float = 3600.0  # results live so long from completion
    queue_s: float = 3600.0  # a job that waits longer fails
    run_s: float = 1800.0  # a job that runs longer fails
    lease_s: float = 10.0  # a worker silent for so long has lost its jobs
    drain_s: float = 20.0  # a worker that is told to stop may finish what it holds for so long
    park_s: float = 10.0  # a job under way is saved so often, for when its worker is lost; 0: never
    hang_s: float = 300.0  # a UNet call that takes longer is a hang
    wait_s: float = 600.0  # the longest wait of a v1 call
    max_body: int = 262_144  # bytes
    rules: str = ""  # a file of prompt rules of your own, see moderation/rules.py
    checker: str = ""  # of pictures: package.module:callable or a URL, see worker/image_checker.py
    webhook_networks: str = ""  # open to webhooks beside public addresses: 10.0.0.0/8,fd00::/8
    models: Path = Path()  # models on offer, see models.toml; empty: DATA/models.toml if it exists
    loras: Path = Path()  # folder of LoRA files; empty: DATA/loras
    embeddings: Path = Path()  # folder of textual inversions; empty: DATA/embeddings
    aliases: Path = Path()  # more slugs, see aliases.toml; empty: DATA/aliases.toml if it exists
    cors: str = ""  # origins of web pages that may call, separated by commas, or *; empty: none
    history_s: float = 31 * 86_400.0  # what was asked and what it cost is listed so long; 0: not
    connections: int = 4000  # open at a time
    connections_per_address: int = 1000  # likewise, of one client address

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **given: Any) -> Settings:
        """Defaults, then IMAGED_* variables, then `given` values that are not None."""
        settings = cls()
        for name, default in vars(settings).items():
            text = environ.get(f"IMAGED_{name.upper()}")
            if text is not None:
                settings = replace(settings, **{name: _cast(name, default, text)})
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
        if os.path.isfile(settings.data):
            raise CommandError(
                f"the data folder {settings.data} is a file; choose another with --data"
            )
        for name, (one, other) in CHOICES.items():
            if getattr(settings, name) not in (one, other):
                raise CommandError(f'IMAGED_{name.upper()} should be "{one}" or "{other}"')
        if not 1 <= settings.port <= 65535:
            raise CommandError("IMAGED_PORT should be between 1 and 65535")
        if not 0 <= settings.workers <= MAX_WORKERS:
            raise CommandError(f"IMAGED_WORKERS should be between 0 and {MAX_WORKERS}")
        if not settings.host:
            raise CommandError("IMAGED_HOST should not be empty; 0.0.0.0 lets other machines in")
        return settings

    @property
    def aliases_file(self) -> Path | None:
        """The operator's aliases, if there are any."""
        return self._own(self.aliases, "aliases.toml")

    @property
    def models_file(self) -> Path | None:
        """The operator's models, if there are any."""
        return self._own(self.models, "models.toml")

    def _own(self, given: Path, name: str) -> Path | None:
        if given != Path():
            return given
        own = self.data / name
        return own if own.exists() else None

    @property
    def loras_folder(self) -> Path:
        return self.loras if self.loras != Path() else self.data / "loras"

    @property
    def embeddings_folder(self) -> Path:
        return self.embeddings if self.embeddings != Path() else self.data / "embeddings"

    def lora_names(self) -> list[str]:
        """The LoRA files there are at the moment, by name."""
        return sorted(path.stem for path in self.loras_folder.glob("*.safetensors"))

    @property
    def leave_s(self) -> float:
        """After so long a process that was told to stop is gone, whatever hangs in it."""
        return self.drain_s + 10

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data.resolve() / 'imaged.db'}"

    @property
    def blobs(self) -> str:
        return self.blobs_url or f"file://{self.data.resolve() / 'files'}"


def _cast(name: str, default: Any, text: str) -> Any:
    try:
        return type(default)(text) if not isinstance(default, Path) else Path(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise CommandError(f"IMAGED_{name.upper()} should be {kind}") from None
