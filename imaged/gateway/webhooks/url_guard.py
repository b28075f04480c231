"""Protection against server-side request forgery: which addresses webhooks may have.

Callers choose where this server connects to. A name is resolved once, all its addresses must be
allowed, and the connection goes to a checked address rather than to the name (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from weakref import WeakValueDictionary

import httpx

from imaged.errors import BadParameter, CommandError, ImagedError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Lookup = Callable[..., Sequence[tuple[Any, ...]]]

MAX_URL_LENGTH = 2048
THREADS, EACH = 32, 2  # look-ups at a time, for all API keys and for one
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_NUMERIC = re.compile(r"(?:.*\.)?(?:0[xX][0-9a-fA-F]*|[0-9]+)\.?")  # libc reads it as an address

#: Not public hosts, though `ipaddress` calls them global.
_NOT_PUBLIC = [
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # a cloud's own service, on every machine of it
        "192.0.0.0/24",  # protocol assignments, among them another cloud's metadata
        "192.88.99.0/24",  # relays into IPv6
        "2001::/23",  # protocol assignments, among them tunnels that carry an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # carries an IPv4 address
        "3fff::/20",
    )
]
_UNICAST = IPv6Network("2000::/3")  # all of IPv6 that is given out


class UnsafeAddress(ImagedError):
    """The address is not a public one."""

    code = "unsafe_address"


class UrlGuard:
    """Checks URLs and resolves names; networks: allowed beside public addresses."""

    def __init__(
        self, networks: Sequence[Network] = (), lookup: Lookup = socket.getaddrinfo
    ) -> None:
        self._networks, self._lookup = networks, lookup
        # Its own threads: a name server that is silent must not hold up the gateway's others.
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="resolve")
        self._places: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()

    @classmethod
    def load(cls, setting: str) -> UrlGuard:
        """From IMAGED_WEBHOOK_NETWORKS, networks with commas between; raises CommandError."""
        try:
            return cls([ipaddress.ip_network(t.strip()) for t in setting.split(",") if t.strip()])
        except ValueError as error:
            raise CommandError(f"IMAGED_WEBHOOK_NETWORKS: {error}") from None

    def check(self, text: Any) -> httpx.URL:
        """Parse and check a webhook's URL without resolving its name. Raises BadParameter, which
        does not repeat what was sent.
        """
        if not isinstance(text, str) or len(text) > MAX_URL_LENGTH or not _VISIBLE.fullmatch(text):
            raise _refusal(f"should be a URL of at most {MAX_URL_LENGTH} ASCII characters")
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            raise _refusal("should be a URL") from None
        if url.scheme not in ("http", "https"):
            raise _refusal("should begin with https:// or http://")
        if url.userinfo or "@" in text.split("//", 1)[-1].split("/")[0] or "\\" in text:
            raise _refusal("should have no user name, password or backslash")
        if url.port is not None and url.port not in (80, 443) and not 1024 <= url.port <= 65535:
            raise _refusal("should have port 80, 443 or one from 1024 on")
        self._check_host(host_of(url))
        return url

    async def resolve(self, url: httpx.URL, key_id: int) -> str:
        """The address to connect to. Raises UnsafeAddress if any address of the name is not
        allowed, OSError if there is no such name.
        """
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await self._found(host_of(url), port, key_id)
        addresses = [_address(entry[4][0]) for entry in found]
        if not addresses or not all(a is not None and self.allows(a) for a in addresses):
            raise UnsafeAddress()
        return str(addresses[0])

    def allows(self, address: Address) -> bool:
        """Whether it is public, or in one of the operator's networks."""
        return is_public(address) or any(address in network for network in self._networks)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _found(self, host: str, port: int, key_id: int) -> Sequence[tuple[Any, ...]]:
        """Resolve in a thread, EACH at a time per API key. A lookup cannot be cancelled: it keeps
        its thread and its place until it ends.
        """
        loop = asyncio.get_running_loop()
        places = self._places.setdefault(key_id, asyncio.Semaphore(EACH))
        await places.acquire()
        asked = self._threads.submit(self._lookup, host, port, type=socket.SOCK_STREAM)

        def leave(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended before the look-up
                loop.call_soon_threadsafe(places.release)

        asked.add_done_callback(leave)
        return await asyncio.wrap_future(asked)

    def _check_host(self, host: str) -> None:
        address = _address(host)
        if address is None and (not _NAME.fullmatch(host) or _NUMERIC.fullmatch(host)):
            raise _refusal("should have a host name, or an address in its usual form")
        if address is not None and not self.allows(address):
            raise _refusal("should lead to a public address")


def _refusal(problem: str) -> BadParameter:
    return BadParameter("webhook_url", problem)


def host_of(url: httpx.URL) -> str:
    """The host name in ASCII (IDNA) form."""
    return url.raw_host.decode("ascii")


def is_public(address: Address) -> bool:
    """Whether it is a public unicast address."""
    if isinstance(address, IPv6Address) and (address not in _UNICAST or address.scope_id):
        return False  # also every form that carries an IPv4 address inside
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _NOT_PUBLIC)
    )


def _address(text: str) -> Address | None:
    """An IP address, or None for a name."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
