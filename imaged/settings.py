"""How a process is set up: defaults, IMAGED_* variables of the environment, command-line options.

Every setting is one field of Settings with its bounds and its text. The checks, `imaged config` and
docs/settings.md read them from there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from imaged.errors import CommandError

log = logging.getLogger(__name__)

PREFIX = "IMAGED_"
MAX_WORKERS = 64
#: Variables with the prefix that are no settings: the client's, and that of logging (cli/app.py).
OTHERS = ("IMAGED_URL", "IMAGED_API_KEY", "IMAGED_LOG")
#: What Kubernetes and Docker add to the environment for a service of such a name, by themselves.
_INJECTED = re.compile(
    r"IMAGED_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S*")
_PASSWORD = re.compile(r"(//[^/@\s]*?:)[^/@\s]*@")

Text = Annotated[str, Meta(max_length=100_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
#: Up to 3,000 years: dates end with the year 9999.
Seconds = Annotated[float, Meta(ge=0, le=1e11)]
SomeSeconds = Annotated[float, Meta(gt=0, le=1e11)]


def _of(text: str) -> Meta:
    return Meta(description=text)


@dataclass(frozen=True)
class Settings:
    """Every setting, with the embedded default: one folder, nothing else."""

    data: Annotated[Path, _of("Folder of the database, the pictures and the keys.")] = Path("data")
    database_url: Annotated[Text, _of("Database; empty: SQLite in the data folder.")] = ""
    blobs_url: Annotated[Text, _of("Where pictures are kept; empty: in the data folder.")] = ""
    public_url: Annotated[
        Text, _of("What links to pictures and jobs begin with; empty: each request's own origin.")
    ] = ""
    host: Annotated[
        str, Meta(min_length=1), _of("Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535), _of("Port to listen on.")] = 8000
    workers: Annotated[
        int, Meta(ge=0, le=MAX_WORKERS), _of("Worker processes; 0: a gateway alone.")
    ] = 1
    slots: Annotated[Count, _of("Jobs that one worker runs at a time.")] = 4
    threads: Annotated[
        int, Meta(ge=0, le=1024), _of("CPU threads of a worker; 0: PyTorch's own choice.")
    ] = 0
    memory_gb: Annotated[
        float,
        Meta(ge=0, le=1e6),
        _of("Gigabytes of one worker's weights; 0: half of its share of the device."),
    ] = 0.0
    idle_s: Annotated[
        Seconds, _of("A checkpoint that no job needs for so long is unloaded; 0: never.")
    ] = 0.0
    patience_s: Annotated[
        Seconds, _of("How long a job for an unloaded checkpoint waits behind others' jobs.")
    ] = 15.0
    graphs: Annotated[Literal["on", "off"], _of("CUDA graphs, on a GPU.")] = "off"
    determinism: Annotated[
        Literal["exact", "close"],
        _of("exact: a picture has the same bits in any company; close: but for the last ones."),
    ] = "exact"
    receipts: Annotated[
        Literal["embedded", "results"], _of("Receipts in picture files too, or in results alone.")
    ] = "embedded"
    retention_s: Annotated[
        SomeSeconds, _of("How long results and pictures are kept, from a job's end.")
    ] = 3600.0
    queue_s: Annotated[SomeSeconds, _of("A job that waits longer fails.")] = 3600.0
    run_s: Annotated[SomeSeconds, _of("A job that runs longer fails.")] = 1800.0
    lease_s: Annotated[
        SomeSeconds, _of("A worker that is silent for so long has lost its jobs.")
    ] = 10.0
    drain_s: Annotated[
        Seconds, _of("How long a worker that is told to stop may finish its jobs.")
    ] = 20.0
    park_s: Annotated[
        Seconds, _of("How often a job under way is saved, should its worker be lost; 0: never.")
    ] = 10.0
    hang_s: Annotated[
        SomeSeconds, _of("A worker whose loop stands still for longer hangs, and is ended.")
    ] = 300.0
    wait_s: Annotated[Seconds, _of("The longest wait of a v1 call.")] = 600.0
    max_body: Annotated[int, Meta(ge=1, le=1_000_000_000), _of("Bytes of a request's body.")] = (
        262_144
    )
    rules: Annotated[Text, _of("File of prompt rules of your own; empty: none.")] = ""
    checker: Annotated[
        Text, _of("Checker of pictures: package.module:callable, or a URL; empty: none.")
    ] = ""
    webhook_networks: Annotated[
        Text, _of("Networks open to webhooks beside public addresses: 10.0.0.0/8,fd00::/8.")
    ] = ""
    models: Annotated[Path, _of("models.toml; empty: that of the data folder, if any.")] = Path()
    loras: Annotated[Path, _of("Folder of LoRA files; empty: loras in the data folder.")] = Path()
    embeddings: Annotated[
        Path, _of("Folder of textual inversions; empty: embeddings in the data folder.")
    ] = Path()
    aliases: Annotated[Path, _of("aliases.toml; empty: that of the data folder, if any.")] = Path()
    cors: Annotated[
        Text, _of("Origins of web pages that may call, separated by commas, or *; empty: none.")
    ] = ""
    history_s: Annotated[
        Seconds, _of("How long requests and their costs are listed; 0: only while jobs exist.")
    ] = 31 * 86_400.0
    connections: Annotated[Count, _of("Open connections, in all.")] = 4000
    connections_per_address: Annotated[Count, _of("Likewise, of one client address.")] = 1000

    @classmethod
    def from_env(cls, environ: Mapping[str, str], **given: Any) -> Settings:
        """Defaults, then IMAGED_* variables, then `given` values that are not None.

        Raises CommandError for variables that are no setting and for values out of bounds.
        """
        settings = cls()
        for variable, text in environ.items():
            if variable.startswith(PREFIX) and (name := setting_of(variable, text)):
                settings = replace(settings, **{name: known()[name].read(text, variable)})
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
        if os.path.isfile(settings.data):  # not Path.is_file, which raises where it may not look
            raise CommandError(
                f"the data folder {settings.data} is a file; choose another with --data"
            )
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


@dataclass(frozen=True)
class Setting:
    """What is known of one setting. low and high are inclusive; with `above` low is not."""

    name: str
    default: Any
    text: str
    kind: Any  # int, float, str, Path, or a Literal
    hint: Any  # kind with its bounds
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def allowed(self) -> str:
        """The allowed values, in words."""
        if self.choices:
            return " or ".join(f'"{choice}"' for choice in self.choices)
        if self.kind is Path:
            return "a path"
        if self.kind is str:
            return "text" if self.low is None else "text, and not empty"
        noun = "a whole number" if self.kind is int else "a number"
        if self.above:
            return f"{noun} above {self.low:,.0f} and up to {self.high:,.0f}"
        return f"{noun} between {self.low:,.0f} and {self.high:,.0f}"

    def read(self, text: str, called: str) -> Any:
        """The value from text; raises CommandError, `called` naming what was set."""
        if self.kind is Path:
            return Path(text)
        try:
            given = text if self.kind is str else text.strip()
            return msgspec.convert(given, self.hint, strict=False)
        except msgspec.ValidationError:
            found = json.dumps(text[:40], ensure_ascii=False)
            raise CommandError(f"{called} should be {self.allowed}, not {found}") from None


@cache
def known() -> Mapping[str, Setting]:
    """Every setting by name, in the order of Settings."""
    hints = get_type_hints(Settings, include_extras=True)
    return {
        field.name: _setting(field.name, field.default, hints[field.name])
        for field in fields(Settings)
    }


def _setting(name: str, default: Any, hint: Any) -> Setting:
    assert default is not MISSING and get_origin(hint) is Annotated
    kind, *metas = get_args(hint)
    facts: dict[str, Any] = {}
    for meta in metas:
        for fact in ("ge", "gt", "le", "min_length", "description"):
            value = getattr(meta, fact)
            facts |= {} if value is None else {fact: value}
    low = facts.get("ge", facts.get("gt", facts.get("min_length")))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return Setting(
        name,
        default,
        facts["description"],
        kind,
        hint,
        low,
        facts.get("le"),
        "gt" in facts,
        choices,
    )


def setting_of(variable: str, text: str) -> str | None:
    """The setting that a variable of the environment sets; None for the client's and for those
    that a cluster adds by itself. Raises CommandError for any other, naming the nearest.
    """
    name = variable.removeprefix(PREFIX).lower()
    if name in known() and variable == known()[name].variable:
        if name == "port" and _ADDRESS.fullmatch(text):
            _ignored(variable)
            return None
        return name
    if variable in OTHERS:
        return None
    if _INJECTED.fullmatch(variable) or (variable.endswith("_PORT") and _ADDRESS.fullmatch(text)):
        _ignored(variable)
        return None
    near = get_close_matches(name, known(), 1, 0.5)
    meant = f"is {known()[near[0]].variable} meant? " if near else ""
    raise CommandError(f"{variable} is no setting: {meant}`imaged config` lists them")


@cache
def _ignored(variable: str) -> None:
    """Say it once."""
    log.warning("%s was set by the cluster for a service of this name: it is ignored", variable)


def shown(value: Any) -> str:
    """A value to show to people: without passwords; "" for an empty path."""
    text = "" if value == Path() else f"{value:.15g}" if isinstance(value, float) else str(value)
    return _PASSWORD.sub(r"\1***@", text)
