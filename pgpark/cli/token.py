"""`pgpark token`: what callers of the HTTP gateway carry."""

from __future__ import annotations

import click

from pgpark import calls
from pgpark.cli.common import Settings, dsn_options, messages, moment, print_json, print_rows


@click.group()
def token() -> None:
    """Tokens: what callers of `pgpark serve` may do."""


@token.command()
@click.argument("name")
@click.option(
    "--as",
    "kinds",
    envvar="PGPARK_TOKEN_CREATE_AS",
    type=click.Choice(["producer", "worker", "reader", "admin"]),
    multiple=True,
    required=True,
    help="What it may do, as in pgpark grant; may be repeated.",
)
@click.option(
    "--tenant",
    "tenants",
    envvar="PGPARK_TOKEN_CREATE_TENANT",
    multiple=True,
    metavar="NAME",
    help="A producer's tenants; may be repeated (default: any).",
)
@click.option(
    "--pool",
    "pools",
    envvar="PGPARK_TOKEN_CREATE_POOL",
    multiple=True,
    metavar="NAME",
    help="The only pools it may use; may be repeated (default: any).",
)
@click.option("--expires", help="From when on it is no good: 2030-01-31T12:00Z, or +90d from now (default: never).")
@click.option("--rate", type=click.FloatRange(1e-6, 1e6), help="Requests a second that it may make (default: any).")
@click.option("--burst", type=click.IntRange(1, 1_000_000), help="Requests at once (default: those of a second).")
@dsn_options
def create(
    settings: Settings,
    name: str,
    kinds: tuple[str, ...],
    tenants: tuple[str, ...],
    pools: tuple[str, ...],
    expires: str | None,
    rate: float | None,
    burst: int | None,
) -> None:
    """Make a token called NAME and print its secret, which is shown this once and stored nowhere."""
    with settings.connection() as connection:
        expires_at = moment(connection, expires)
        made = calls.create_token(name, kinds, tenants or None, pools or None, expires_at, rate, burst)
        secret = calls.run_on(connection, made)
    if settings.json:
        print_json({"name": name, "secret": secret})
    else:
        click.echo(secret)


@token.command("list")
@dsn_options
def list_(settings: Settings) -> None:
    """List the tokens, without their secrets."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.tokens())
    columns = ("name", "kinds", "tenants", "pools", "requests_per_sec", "expires_at", "used_at")
    print_rows(settings, rows, columns, "there are no tokens; see pgpark token create --help")


@token.command()
@click.argument("name")
@dsn_options
def revoke(settings: Settings, name: str) -> int:
    """Make the token NAME useless at once; exit 1 if there is none."""
    with settings.connection() as connection:
        revoked = calls.run_on(connection, calls.revoke_token(name))
    if settings.json:
        print_json({"name": name, "revoked": revoked})
    messages.print(f"{name}: revoked" if revoked else f"there is no token {name}")
    return 0 if revoked else 1
