"""How the processes of pgpark log."""

from __future__ import annotations

import logging


def start_logging(level: int) -> None:
    """Logs to standard error; of the libraries below only what people can use."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
