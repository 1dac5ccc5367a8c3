"""Who may do what: access of roles, and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pgpark.calls.call import Call, described, many, one, value_of
from pgpark.models import Admission, Grant, Token, TokenScope


def grant(role: str, kind: str, tenants: Sequence[str] | None = None, pools: Sequence[str] | None = None) -> Call[None]:
    """Gives a role access of a kind: producer, worker, reader or admin; None for any tenants or pools."""
    return described(
        "park_grant",
        lambda _rows: None,
        role=role,
        kind=kind,
        tenants=None if tenants is None else list(tenants),
        pools=None if pools is None else list(pools),
    )


def revoke(role: str, kind: str | None = None) -> Call[int]:
    """Takes access of a kind (None: of every kind) from a role; returns how many kinds it had of those."""
    return described("park_revoke", value_of("park_revoke"), role=role, kind=kind)


def grants() -> Call[list[Grant]]:
    """Who may do what."""
    return described("park_grants", many(Grant))


def create_token(
    name: str,
    kinds: Sequence[str],
    tenants: Sequence[str] | None = None,
    pools: Sequence[str] | None = None,
    expires_at: datetime | str | None = None,
    requests_per_sec: float | None = None,
    burst: int | None = None,
) -> Call[str]:
    """Makes a token and returns its secret, which is stored nowhere; None: any tenants or pools, no end, no limit."""
    return described(
        "park_create_token",
        value_of("park_create_token"),
        name=name,
        kinds=list(kinds),
        tenants=None if tenants is None else list(tenants),
        pools=None if pools is None else list(pools),
        expires_at=expires_at,
        requests_per_sec=requests_per_sec,
        burst=burst,
    )


def revoke_token(name: str) -> Call[bool]:
    """Makes a token useless; False if there is none of that name."""
    return described("park_revoke_token", value_of("park_revoke_token"), name=name)


def tokens() -> Call[list[Token]]:
    """The tokens that there are, without their secrets."""
    return described("park_tokens", many(Token))


def enter(token_hash: str) -> Call[TokenScope]:
    """Makes the rest of the transaction act for a token, given by the SHA-256 of its secret in hexadecimal digits."""
    return described("park_enter", one(TokenScope), token_hash=token_hash)


def admit(token_hash: str) -> Call[Admission]:
    """Counts a request of a token against its limit; in a transaction of its own."""
    return described("park_admit", one(Admission), token_hash=token_hash)
