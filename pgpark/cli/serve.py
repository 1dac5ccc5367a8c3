"""`pgpark serve`: the HTTP gateway."""

from __future__ import annotations

import logging

import click

from pgpark.cli.common import Seconds, Settings, database_options, log_json_option
from pgpark.errors import BadInputError
from pgpark.logs import start_logging


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option(
    "--connections", default=10, show_default=True, type=click.IntRange(1, 1000), help="Most connections to Postgres."
)
@click.option("--max-body-kb", default=4096, show_default=True, type=click.IntRange(1, 1 << 20), help="Of a request.")
@click.option(
    "--max-streams",
    default=2000,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help="Most clients that wait at once; they hold no connection to Postgres.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    envvar="PGPARK_SERVE_CORS_ORIGIN",
    multiple=True,
    metavar="URL",
    help="Let pages of this origin call; may be repeated, or * for any (default: none).",
)
@click.option(
    "--drain",
    default=3.0,
    show_default=True,
    type=Seconds(0),
    help="Seconds after SIGTERM in which /ready says 503 and requests are still accepted.",
)
@click.option(
    "--local-token/--no-local-token",
    default=True,
    help="On a loopback address, where there are no tokens yet: make one for a day, and print it (default: yes).",
)
@click.option("--poll", is_flag=True, help="Do not LISTEN; those who wait look each second (behind PgBouncer).")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@log_json_option
@database_options
def serve(
    settings: Settings,
    host: str,
    port: int,
    connections: int,
    max_body_kb: int,
    max_streams: int,
    cors_origins: tuple[str, ...],
    drain: float,
    local_token: bool,
    poll: bool,
    verbose: bool,
    log_json: bool,
) -> None:
    """Serve pgpark over HTTP until SIGTERM or SIGINT; prints the URL of its page.

    One gateway serves one database; any number may serve the same one. Callers carry tokens: pgpark token create.
    """
    try:
        from pgpark.gateway.server import ServerSettings
        from pgpark.gateway.server import serve as run
        from pgpark.gateway.settings import GatewaySettings
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pgpark"):
            raise
        raise BadInputError(
            f"{error.name} is not installed; pgpark serve needs: pip install 'pgpark[gateway]'"
        ) from None
    start_logging(logging.DEBUG if verbose else logging.INFO, log_json)
    with settings.database() as dsn:
        run(
            GatewaySettings(
                dsn=dsn,
                max_connections=connections,
                max_body_bytes=max_body_kb << 10,
                max_streams=max_streams,
                cors_origins=cors_origins,
                listen=not poll,
                look_secs=1.0 if poll else 30.0,
            ),
            ServerSettings(host=host, port=port, local_token=local_token, drain_secs=drain),
            lambda url: click.echo(url),
        )
