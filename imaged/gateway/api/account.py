"""Account routes of a key: credits, identity."""

from __future__ import annotations

import sqlalchemy as sa
from msgspec import field
from starlette.requests import Request

from imaged.gateway.auth import keyed, public
from imaged.gateway.context import Gateway
from imaged.gateway.present.answer import Answer, Body
from imaged.gateway.present.units import dollars
from imaged.store.accounts import ledger
from imaged.store.accounts.keys import Key


class UserCredits(Body):
    """Dollars."""

    credits: float
    free_credits: float = field(name="free-credits")


class Money(Body):
    """Dollars, as the MCP server calls them."""

    remaining: float
    used: float


class CreditsData(Body):
    credits: Money


class Credits(Body):
    """What is left and used."""

    data: CreditsData


class Caller(Body):
    """Who a key is; money in dollars."""

    user_id: str
    name: str
    credits: float
    credits_used: float


class Word(Body):
    """One word on how the server is."""

    status: str


@keyed
async def user_credits(request: Request, gateway: Gateway, key: Key) -> Answer[UserCredits]:
    """GET /v1/get-user-credits: what is left on the key, in dollars."""
    left = await gateway.db.query(lambda c: ledger.free(c, key.id))
    return Answer(UserCredits(dollars(left), 0.0))


@keyed
async def credits(request: Request, gateway: Gateway, key: Key) -> Answer[Credits]:
    """GET /v1/credits: left and used, in the words of the MCP server."""
    money = await gateway.db.query(lambda c: _money(c, key))
    return Answer(Credits(CreditsData(money)))


@keyed
async def current(request: Request, gateway: Gateway, key: Key) -> Answer[Caller]:
    """GET /api/auth/authenticate: who the key is."""
    money = await gateway.db.query(lambda c: _money(c, key))
    return Answer(Caller(str(key.id), key.name, money.remaining, money.used))


@public
async def health(_: Request) -> Answer[Word]:
    """GET /v1/health: the event loop turns."""
    return Answer(Word("ok"))


def _money(connection: sa.Connection, key: Key) -> Money:
    left, used = ledger.free(connection, key.id), ledger.used(connection, key.id)
    return Money(dollars(left), dollars(used))
