"""`pgpark apply` and `pgpark config`: pools as a file describes them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pgpark.apply import Applied
from pgpark.apply import apply as apply_config
from pgpark.cli.common import Settings, dsn_options, print_json
from pgpark.config import SCHEMA_FILE, load
from pgpark.places import Place


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--dry-run", envvar="PGPARK_APPLY_DRY_RUN", is_flag=True, help="Print what would change, and change nothing."
)
@dsn_options
def apply(settings: Settings, file: Path, dry_run: bool) -> None:
    """Create and change the pools of a config FILE (JSON or YAML): all of them or, if one is wrong, none.

    A pool lives in its `database`; with a queue of type yaque, in the embedded Postgres in its path; else in --dsn or
    the embedded Postgres in --home. Pools that the file does not name are left alone. ${NAME} in a string is a variable
    of the environment, ${NAME:-default} has a default.
    """
    for pool in apply_config(load(file), Place(settings.dsn, settings.home), dry_run=dry_run):
        if settings.json:
            changes = [change.model_dump() for change in pool.changes]
            place = str(pool.place)
            print_json({"pool": pool.pool, "result": pool.result, "place": place, "changes": changes})
        else:
            _print(pool, dry_run)


@click.group()
def config() -> None:
    """The config file."""


@config.command()
def schema() -> None:
    """Print the JSON Schema of the config file, which editors use to complete and check it."""
    click.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)


def _print(pool: Applied, dry_run: bool) -> None:
    would = "would be " if dry_run and pool.result != "unchanged" else ""
    click.echo(f"{pool.pool} {would}{pool.result} in {pool.place}")
    for change in pool.changes if pool.result == "changed" else ():
        click.echo(f"  {change.key}: {_shown(change.before)} -> {_shown(change.after)}")


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
