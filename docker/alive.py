"""Is the pgpark of this container alive? The image's health check: exits with 0 if the worker (on its metrics port)
or the gateway (on its port) answers, else with 1 and a line that says what was tried.

Only the ports that the environment names are asked, on this host, without a proxy. It says nothing about the
database: ask the gateway's /ready for that.
"""

from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException

_PORTS = ("PGPARK_WORKER_METRICS_PORT", "PGPARK_SERVE_PORT")
_PATIENCE_SECS = 3.0


def trouble(port: str) -> str | None:
    """What is wrong with the server at this port; None when it answers that it is well."""
    try:
        connection = HTTPConnection("127.0.0.1", int(port), timeout=_PATIENCE_SECS)
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, ValueError, HTTPException) as error:
        return f"port {port}: {error}"
    return None if status == 200 else f"port {port}: status {status}"


if __name__ == "__main__":
    troubles = [trouble(os.environ[name]) for name in _PORTS if os.environ.get(name)]
    if None not in troubles:
        sys.exit("; ".join(filter(None, troubles)) or f"set one of {', '.join(_PORTS)}")
