"""The generated pages are those that the functions, commands and config keys of today make."""

from __future__ import annotations

import psycopg
import pytest
from psycopg.rows import DictRow

from tests.conftest import Database
from tests.docs.generate import COMMAND, REFERENCE, commands, pages


@pytest.fixture
def generated(db: Database) -> dict[str, str]:
    connection: psycopg.Connection[DictRow] = db.connection
    return pages(connection)


def test_the_references_are_current(generated: dict[str, str]) -> None:
    for name, text in generated.items():
        assert (REFERENCE / name).read_text() == text, f"docs/reference/{name} is old: run `{COMMAND}`"


def test_every_public_function_has_a_manual_and_says_who_may_call_it(generated: dict[str, str], db: Database) -> None:
    functions = db.rows(
        "select distinct proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname ~ '^park_'"
    )
    assert len(functions) > 30
    for row in functions:
        _, _, entry = generated["sql.md"].partition(f"\n### {row['proname']}\n")
        manual, found, _ = entry.partition("\nMay be called by: ")
        assert found and len(manual) > 100, row["proname"]


def test_every_command_is_in_the_reference(generated: dict[str, str]) -> None:
    for path, command in commands():
        if not hasattr(command, "commands"):
            assert f"\n## pgpark {' '.join(path)}\n" in generated["cli.md"]
