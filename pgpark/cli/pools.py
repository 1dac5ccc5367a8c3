"""`pgpark pool`: make, change, look at, pause and drop pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pgpark import calls
from pgpark.cli.common import Settings, database_options, load_json, messages, print_json, print_rows
from pgpark.errors import BadInputError, UnknownPoolError


@click.group()
def pool() -> None:
    """Pools: named resources with a capacity in units."""


@pool.command()
@click.argument("name")
@click.option("--max-units", type=int, help="Capacity: units that may be in use at once.")
@click.option(
    "--set",
    "assignments",
    envvar="PGPARK_POOL_PUT_SET",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any config key, for instance --set max_queue_depth=100 --set retry.max_attempts=3.",
)
@click.option(
    "--config",
    "config_file",
    envvar="PGPARK_POOL_PUT_CONFIG",
    type=click.File(),
    help="JSON or YAML file (- for standard input) with this pool's config, or with pools: {NAME: ...}.",
)
@database_options
def put(settings: Settings, name: str, max_units: int | None, assignments: tuple[str, ...], config_file: Any) -> None:
    """Create a pool, or change what is named of an existing one. With --config, its whole config is replaced."""
    with settings.connection() as connection:
        if config_file is not None:
            config = _config_from(config_file.read(), config_file.name, name)
        else:
            try:
                config = dict(calls.run_on(connection, calls.pools(name))[0].config)
            except UnknownPoolError:
                config = {}
        if max_units is not None:
            config["max_units"] = max_units
        for assignment in assignments:
            _assign(config, assignment)
        word = calls.run_on(connection, calls.put_pool(name, config))
    if settings.json:
        print_json({"pool": name, "result": word})
    messages.print(f"pool {name} {word}")


@pool.command("list")
@database_options
def list_(settings: Settings) -> None:
    """List the pools."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.stats())
    columns = ("pool", "state", "max_units", "used_units", "running", "parked", "delayed")
    print_rows(settings, rows, columns, "there are no pools yet; make one: pgpark pool put NAME --max-units N")


@pool.command()
@click.argument("name")
@database_options
def show(settings: Settings, name: str) -> None:
    """Show one pool with all its settings."""
    with settings.connection() as connection:
        info = calls.run_on(connection, calls.pools(name))[0]
    if settings.json:
        print_json(info)
    else:
        click.echo(f"{info.name} ({info.state})")
        click.echo(json.dumps(info.settings, indent=2))


def _state_command(command: str, state: str, help_text: str) -> click.Command:
    @pool.command(command, help=help_text)
    @click.argument("name")
    @database_options
    def change(settings: Settings, name: str) -> None:
        with settings.connection() as connection:
            calls.run_on(connection, calls.set_pool_state(name, state))
        if settings.json:
            print_json({"pool": name, "state": state})
        messages.print(f"pool {name} is {state}")

    return change


_state_command("pause", "paused", "Start nothing more; tasks are still accepted.")
_state_command("resume", "active", "Accept and start tasks again.")
_state_command("drain", "draining", "Accept nothing more; what is there goes on.")
_state_command("disable", "disabled", "Neither accept nor start anything.")


@pool.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Also with live tasks: each of them ends as dropped.")
@database_options
def drop(settings: Settings, name: str, force: bool) -> None:
    """Drop a pool with its queue; outcomes in the mailbox stay."""
    with settings.connection() as connection:
        calls.run_on(connection, calls.drop_pool(name, force))
    if settings.json:
        print_json({"pool": name, "result": "dropped"})
    messages.print(f"pool {name} dropped")


def _config_from(text: str, file: str, name: str) -> dict[str, Any]:
    if Path(file).suffix in {".yaml", ".yml"}:
        try:
            import yaml
        except ImportError as error:
            raise BadInputError(f"{file}: YAML needs the extra: pip install 'pgpark[yaml]'") from error
        try:
            config = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:  # its own text repeats the line, which may hold a secret
            mark = error.problem_mark
            place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
            raise BadInputError(f"{file} is not YAML: {error.problem}{place}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise BadInputError(f"{file} is not YAML: {error}") from error
    else:
        config = load_json(text, file)
    if isinstance(config, dict) and isinstance(config.get("pools"), dict):
        if name not in config["pools"]:
            there = ", ".join(map(str, config["pools"]))
            raise BadInputError(f"{file}: there is no pool {name!r} below pools, only {there}")
        config = config["pools"][name]
    try:
        config = json.loads(json.dumps(config))  # a date or a set in YAML has no place in a config
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: the config of a pool must be made of JSON values: {error}") from error
    if not isinstance(config, dict):
        raise BadInputError(f"{file}: the config of a pool must be an object with max_units")
    return config


def _assign(config: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise BadInputError(f"--set {assignment!r} must look like KEY=VALUE, for instance max_queue_depth=100")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *groups, key = path.split(".")
    for group in groups:
        inner = config.get(group)
        config[group] = dict(inner) if isinstance(inner, dict) else {}
        config = config[group]
    config[key] = value
