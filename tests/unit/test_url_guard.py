"""Where webhooks may lead: hostile URLs, hostile names, and names that change their mind."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
import pytest

from imaged.errors import BadParameter, CommandError
from imaged.gateway.webhooks.url_guard import UnsafeAddress, UrlGuard, is_public

PUBLIC = "93.184.216.34"

#: No connection may come of these, whatever the system's resolver makes of their host.
HOSTILE = [
    "http://127.0.0.1/",
    "http://127.255.255.254:8080/",
    "http://0.0.0.0/",
    "http://0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",  # shared by carriers; one cloud's metadata is at 100.100.100.200
    "http://100.100.100.200/latest/meta-data/",
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.170.2/",
    "http://168.63.129.16/",
    "http://192.0.0.192/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.1/",
    "http://203.0.113.1/",
    "http://192.88.99.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    # the same in other spellings
    "http://2130706433/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.01/",
    "http://2852039166/",
    "http://0xa9fea9fe/",
    "http://1.2.3.4.5/",
    "http://256.256.256.256/",
    # IPv6, and IPv4 inside it
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::a9fe:a9fe]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001::7f00:1]/",
    "http://[2001:db8::1]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[100::1]/",
    "http://[3fff::1]/",
    # not for webhooks
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://example.com:6379/_x",
    "unix:/run/docker.sock",
    "//example.com/",
    "example.com/hook",
    "http:///hook",
    "http://",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1#@example.com/",
    "http://127.0.0.1\\@example.com/",
    "http://example.com\\.internal/",
    "http://example.com:22/",
    "http://example.com:25/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:x/",
    "http://exa mple.com/",
    "http://example.com/\r\nx-injected: 1",
    "http://example.com/\x00",
    "http://%31%32%37.0.0.1/",
    "http://exämple.com/",
    "http://①②⑦.0.0.1/",
    "http://127。0。0。1/",
    "http://-example.com/",
    "http://a..b/",
    "http://" + "a" * 64 + ".com/",
    "http://example.com/" + "x" * 2048,
    "",
    None,
    7,
    ["http://example.com/"],
]

#: Answers of a name server; every one of them holds an address that is not allowed.
ANSWERS = [
    ["127.0.0.1"],
    ["169.254.169.254"],
    [PUBLIC, "10.0.0.1"],
    ["10.0.0.1", PUBLIC],
    [PUBLIC, "::1"],
    [PUBLIC, "::ffff:10.0.0.1"],
    ["2606:2800:21f:cb07::1", "fd00::1"],
    ["fe80::1%eth0"],
    ["64:ff9b::a00:1"],
    ["2002:a00:1::1"],
    ["not an address"],
    [],
]


def answering(*answers: Sequence[str]) -> Any:
    """A name server that gives these answers one after the other, and how often it was asked."""
    left = list(answers)

    def lookup(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        found = left.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in found]

    return lookup, left


def reached(text: Any, url_guard: UrlGuard) -> str:
    """The address that a connection would go to."""
    try:
        return asyncio.run(url_guard.resolve(url_guard.check(text), 1))
    finally:
        url_guard.close()


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: str(t)[:60])
def test_hostile_urls_lead_nowhere(text: Any) -> None:
    lookup, left = answering([PUBLIC])  # so that nothing but the URL itself can refuse
    with pytest.raises(BadParameter, match=r"^webhook_url should"):
        reached(text, UrlGuard(lookup=lookup))
    assert len(left) == 1  # nobody was even asked


@pytest.mark.parametrize("answer", ANSWERS, ids=str)
def test_one_wrong_address_of_a_name_is_enough(answer: list[str]) -> None:
    lookup, _ = answering(answer)
    with pytest.raises(UnsafeAddress):
        reached("https://example.com/", UrlGuard(lookup=lookup))


@pytest.mark.parametrize("name", ["localhost", "localhost."])
def test_names_of_this_machine_are_refused_by_their_address(name: str) -> None:
    with pytest.raises((UnsafeAddress, OSError)):  # the system's own resolver
        reached(f"http://{name}/", UrlGuard())


def test_a_name_is_looked_up_once() -> None:
    lookup, left = answering([PUBLIC], ["127.0.0.1"])  # the second answer is never asked for
    assert reached("https://example.com/hook", UrlGuard(lookup=lookup)) == PUBLIC
    assert len(left) == 1


def others_are_served(limit_s: float) -> bool:
    """Whether a key is told an address while another has forty attempts at a silent server."""
    silence = threading.Event()

    def lookup(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        if host == "silent.example":
            silence.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, port))]

    async def main() -> bool:
        url_guard = UrlGuard(lookup=lookup)

        async def attempt(name: str, key_id: int, within_s: float = 0.3) -> bool:
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    return await url_guard.resolve(httpx.URL(f"http://{name}/"), key_id) == PUBLIC
            return False

        try:
            for _ in range(5):  # each time all of them give up, and their look-ups do not
                given_up = await asyncio.gather(*(attempt("silent.example", 1) for _ in range(8)))
                assert not any(given_up)
            served = await attempt("example.com", 2, limit_s)
            assert not await attempt("example.com", 1)  # its own places are taken
        finally:
            silence.set()
        assert await attempt("example.com", 1, 30)  # and free again once the silence has ended
        url_guard.close()
        return served

    return asyncio.run(main())


def test_a_silent_name_server_holds_up_one_key() -> None:
    assert others_are_served(limit_s=20)


@pytest.mark.slow
def test_mutant_whose_keys_may_hold_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imaged.gateway.webhooks.url_guard.EACH", 100)
    assert not others_are_served(limit_s=0.3)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/hook?x=1",
        "http://example.com:8080",
        "https://example.com.:443/",
        "https://xn--exmple-cua.com/",
        "https://a_b.example.com/",
        f"https://{PUBLIC}/",
        "https://[2606:2800:21f:cb07::1]:8443/",
    ],
)
def test_plain_urls_are_taken(text: str) -> None:
    answer = "2606:2800:21f:cb07::1" if "[" in text else PUBLIC
    lookup, _ = answering([answer])
    assert reached(text, UrlGuard(lookup=lookup)) == answer


def test_an_operator_may_open_networks() -> None:
    url_guard = UrlGuard.load("127.0.0.0/8, fd00::/8")
    for text in ("127.0.0.1", "fd00::1", PUBLIC):
        assert url_guard.allows(ipaddress.ip_address(text))
    for text in ("10.0.0.1", "::1", "169.254.169.254"):
        assert not url_guard.allows(ipaddress.ip_address(text))
    assert url_guard.check("http://127.0.0.1:8080/").port == 8080
    url_guard.close()
    for wrong in ("10.0.0.0/33", "10.0.0.1/8", "everything"):
        with pytest.raises(CommandError, match="IMAGED_WEBHOOK_NETWORKS"):
            UrlGuard.load(wrong)


def test_mutant_that_trusts_is_global_alone_is_seen() -> None:
    """What `ipaddress` calls global and is yet no public host."""
    fooled = [
        text
        for text in ("168.63.129.16", "192.88.99.1", "224.0.0.1", "2002:a9fe:a9fe::1", "::7f00:1")
        if ipaddress.ip_address(text).is_global
    ]
    assert len(fooled) >= 3
    assert not any(is_public(ipaddress.ip_address(text)) for text in fooled)
