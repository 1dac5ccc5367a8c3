"""`pgpark grant`, `revoke` and `grants`: what roles other than the owner of the schema may do."""

from __future__ import annotations

import click

from pgpark import calls
from pgpark.cli.common import Settings, dsn_options, messages, print_json, print_rows

_KINDS = click.Choice(["producer", "worker", "reader", "admin"])


@click.command()
@click.argument("role")
@click.option("--as", "kind", envvar="PGPARK_GRANT_AS", type=_KINDS, required=True, help="What the role may do.")
@click.option(
    "--tenant",
    "tenants",
    envvar="PGPARK_GRANT_TENANT",
    multiple=True,
    metavar="NAME",
    help="A producer's tenants; may be repeated (default: any).",
)
@click.option(
    "--pool",
    "pools",
    envvar="PGPARK_GRANT_POOL",
    multiple=True,
    metavar="NAME",
    help="The only pools it may use; may be repeated (default: any).",
)
@dsn_options
def grant(settings: Settings, role: str, kind: str, tenants: tuple[str, ...], pools: tuple[str, ...]) -> None:
    """Give an existing ROLE access, instead of what it had of this kind.

    A producer submits, cancels, follows and fetches; a worker claims, finishes and delivers callbacks; a reader sees
    numbers of pools, no payloads; an admin may do everything but migrate.
    """
    with settings.connection() as connection:
        calls.run_on(connection, calls.grant(role, kind, tenants or None, pools or None))
    if settings.json:
        print_json({"role": role, "kind": kind, "tenants": tenants or None, "pools": pools or None})
    scope = "".join(f", {what} {', '.join(names)}" for what, names in (("tenants", tenants), ("pools", pools)) if names)
    messages.print(f"{role} is {kind}{scope}")


@click.command()
@click.argument("role")
@click.option("--as", "kind", envvar="PGPARK_REVOKE_AS", type=_KINDS, help="Only this kind of access (default: all).")
@dsn_options
def revoke(settings: Settings, role: str, kind: str | None) -> int:
    """Take access from a ROLE; exit 1 if it had none."""
    with settings.connection() as connection:
        revoked = calls.run_on(connection, calls.revoke(role, kind))
    if settings.json:
        print_json({"role": role, "revoked": revoked})
    messages.print(f"{role}: revoked" if revoked else f"{role} had no such access")
    return 0 if revoked else 1


@click.command()
@dsn_options
def grants(settings: Settings) -> None:
    """List who may do what. The owner of the schema and superusers may do everything."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.grants())
    print_rows(settings, rows, ("role", "kind", "tenants", "pools"), "nobody but the owner; see pgpark grant --help")
