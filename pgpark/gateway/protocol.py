"""HTTP/1.1 as uvicorn speaks it, with an end to its patience.

By itself it would hold a connection for as long as the other side likes on which nobody ever says what they want, goes
on sending after the answer, or does not take what is sent; the first two without a token.
"""

from __future__ import annotations

import asyncio
import logging
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("pgpark.gateway")

_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux


class ImpatientProtocol(H11Protocol):
    """Hangs up on a client that owes us something for too long: the head of a request, or an end after its answer."""

    OWED_SECS = 30.0
    WASTED_BYTES = 8 << 20  # of a body after the answer, so that who is still sending gets to read it
    TAKEN_SECS = 60.0  # for what was sent to be taken, or a part of it; where the kernel can tell
    LEAVING_SECS = 10.0  # the same when the gateway stops

    _timer: asyncio.TimerHandle | None = None
    _wasted = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody is there."""
        super().connection_made(transport)
        if _USER_TIMEOUT is not None:
            client = transport.get_extra_info("socket")
            client.setsockopt(socket.IPPROTO_TCP, _USER_TIMEOUT, int(self.TAKEN_SECS * 1000))
        self._expect(True)

    def data_received(self, data: bytes) -> None:
        """Somebody says something."""
        super().data_received(data)
        answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        self._wasted = self._wasted + len(data) if answered else 0
        if self._wasted > self.WASTED_BYTES:
            self._hang_up()
        else:  # idle, though something was said: the beginning of a request
            self._expect(answered or self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there any more."""
        self._expect(False)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The gateway stops."""
        super().shutdown()
        self.loop.call_later(self.LEAVING_SECS, self._leave)

    def _leave(self) -> None:
        if self.flow.write_paused:
            self._hang_up()

    def _expect(self, owed: bool) -> None:
        if owed and self._timer is None:
            self._timer = self.loop.call_later(self.OWED_SECS, self._hang_up)
        elif not owed and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _hang_up(self) -> None:
        log.debug("hung up on a client that took too long")
        self.transport.abort()
