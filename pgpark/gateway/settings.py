"""How a gateway is set up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatewaySettings:
    """The database of a gateway, and its limits.

    max_connections: to the database, beside the one that listens. connection_secs: how long a request waits for one of
    them. request_secs: how long a call may take. max_body_bytes: of a request. max_streams: event streams and waiting
    requests at once. max_wait_secs: the longest that a request may wait for something. heartbeat_secs: between comments
    on a silent stream. look_secs: between looks of those who wait, though nobody has told them to. listen: hear
    notifications; not possible behind a pooler in transaction mode. cors_origins: of pages that may call.
    """

    dsn: str
    max_connections: int = 10
    connection_secs: float = 2.0
    request_secs: float = 30.0
    max_body_bytes: int = 4 << 20
    max_streams: int = 2000
    max_wait_secs: float = 60.0
    heartbeat_secs: float = 15.0
    look_secs: float = 30.0
    listen: bool = True
    cors_origins: tuple[str, ...] = ()
