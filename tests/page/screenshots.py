"""The pictures of docs/page.md: `python -m tests.page.screenshots [FOLDER]`.

An embedded server, an hour of work by a clock that runs ahead, a gateway, and Chromium.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import psycopg
from playwright.sync_api import Browser
from psycopg.rows import dict_row
from rich.console import Console
from rich.terminal_theme import MONOKAI

from pgpark import calls
from pgpark.cli.picture import pool_picture
from pgpark.embedded import EmbeddedServer
from pgpark.gateway.settings import GatewaySettings
from pgpark.migrate import migrate
from tests.conftest import Database
from tests.gateway.conftest import Gateway
from tests.page.conftest import a_browser
from tests.page.hours import an_hour

DOCS = Path(__file__).parent.parent.parent / "docs"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home)).use() as dsn:
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
            migrate(connection)
        db = Database(dsn)
        fill(db)
        gateway = Gateway(db, GatewaySettings(dsn))
        with a_browser() as browser:
            shoot(browser, gateway, folder)
            shoot_terminal(browser, db, folder)
        gateway.close()
        db.close()


def fill(db: Database) -> None:
    """Pools as somebody may have them."""
    db.pool(
        max_units=24,
        max_bypass=4,
        archive=True,
        resource_kind="gpu_vram",
        retry={"max_attempts": 2, "backoff_secs": 40},
    )
    an_hour(db, "gpu", units=24)
    db.pool("browsers", max_units=8)
    for number, worker in enumerate(("web-1", "web-1", "web-2")):
        db.parked("browsers", tenant="acme", units=1 + number)
        db.claim("browsers", worker=worker)
    db.pool("embeddings", max_units=4000)
    for number in range(40):
        db.parked("embeddings", tenant=("acme", "globex", "initech")[number % 3], units=20 + 11 * (number % 9))
    db.claim("embeddings", worker="cpu-1")
    db.pool("nightly", max_units=2)
    db.rows("select pgpark.park_set_pool_state('nightly', 'paused')")
    db.parked("nightly", tenant="initech")


def shoot(browser: Browser, gateway: Gateway, folder: Path) -> None:
    secret = gateway.secret("admin")
    shots = {
        "page-light.png": ({"width": 1360, "height": 1000}, "light"),
        "page-dark.png": ({"width": 1360, "height": 1000}, "dark"),
        "page-phone.png": ({"width": 360, "height": 1420}, "light"),
    }
    for name, (viewport, scheme) in shots.items():
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        page = context.new_page()
        page.goto(f"{gateway.url}/#pool=gpu&token={secret}")
        page.wait_for_selector("#lot .car")
        page.wait_for_selector("#charts svg")
        page.wait_for_timeout(500)
        page.screenshot(path=folder / name, full_page=viewport["width"] > 360)
        context.close()


def shoot_terminal(browser: Browser, db: Database, folder: Path) -> None:
    """`pgpark top` as a terminal of 100 columns shows it."""
    console = Console(
        record=True, width=100, file=io.StringIO(), color_system="truecolor", force_terminal=True, highlight=False
    )
    lot = calls.run_on(db.connection, calls.lot("gpu", 200))
    history = [step.model_dump() for step in calls.run_on(db.connection, calls.history("gpu"))]
    console.print(pool_picture(lot, history, 100))
    html = console.export_html(inline_styles=True, theme=MONOKAI, code_format=_HTML)
    page = browser.new_page(viewport={"width": 900, "height": 300})
    page.set_content(html)
    page.locator("pre").screenshot(path=folder / "top.png")
    page.close()


_HTML = """<style>pre {{ display: inline-block; margin: 0; padding: 18px 20px; background: #0c0f14; color: #d9dee6;
font: 14px/1.3 "DejaVu Sans Mono", monospace }}</style><pre>{code}</pre>"""


if __name__ == "__main__":
    main()
