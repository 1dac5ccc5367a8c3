"""A gateway with the test's database behind it, and Chromium before it.

Where there is no Chromium the tests are skipped, or fail if PGPARK_TEST_NEEDS_BROWSER is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pgpark import Worker, WorkerSettings
from pgpark.executors import FunctionExecutor
from tests.browser.conftest import FLAGS, missing
from tests.conftest import Database
from tests.gateway.conftest import Gateway, gateway, gateways

__all__ = ["gateway", "gateways"]


expect.set_options(timeout=20_000)


@contextlib.contextmanager
def a_browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path or missing("there is no Chromium on this machine"), args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """While it is open, its driver keeps an event loop running in this thread."""
    with a_browser() as browser:
        yield browser


class Seen:
    """What a page complained of: errors of scripts, of its policy, and of the console."""

    def __init__(self, page: Page, expected: tuple[str, ...] = ()) -> None:
        self.errors: list[str] = []
        self.expected = expected
        page.on("console", lambda message: message.type in ("error", "warning") and self._note(message.text))
        page.on("pageerror", lambda error: self._note(str(error)))

    def _note(self, text: str) -> None:
        """Chromium itself notes each answer that is an error; tests that want one name it."""
        if not any(part in text for part in self.expected):
            self.errors.append(text)


@pytest.fixture
def visit(browser: Browser, gateway: Gateway) -> Iterator[Callable[..., Page]]:
    """Opens the page for a new token of these kinds (default: admin); fails if anything was complained of meanwhile."""
    contexts = []
    seen: list[Seen] = []

    def open_(
        *kinds: str,
        pool: str = "gpu",
        expected: tuple[str, ...] = (),
        secret: str | None = None,
        scope: Any = None,
        **look: Any,
    ) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | look))
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        seen.append(Seen(page, expected))
        secret = gateway.secret(*kinds, **(scope or {})) if secret is None else secret
        page.goto(f"{gateway.url}/#pool={pool}" + (f"&token={secret}" if secret else ""))
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [error for one in seen for error in one.errors] == []


class Workplace:
    """A worker in a thread; its tasks run until the test says what becomes of them."""

    def __init__(self, dsn: str, pool: str = "gpu", units: int | None = 24) -> None:
        self._ends: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        settings = WorkerSettings(
            dsn=dsn, pool=pool, units=units, name="live-worker", concurrency=50, grace_secs=1.0, poll_secs=0.2
        )
        self._worker = Worker(settings, FunctionExecutor(self._handle))
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._worker.serve(),), daemon=True)
        self._thread.start()

    async def _handle(self, payload: Any) -> dict[str, str]:
        name = str(payload)
        while name not in self._ends:
            await asyncio.sleep(0.01)
        if self._ends[name] != "completed":
            raise RuntimeError(self._ends[name])
        return {"done": name}

    def end(self, payload: str, how: str = "completed") -> None:
        """Lets the task with this payload end: completed, or failed with these words."""
        self._ends[payload] = how

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._worker.stop)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the worker does not stop"
        self._loop.close()


@pytest.fixture
def workplaces(db: Database) -> Iterator[Callable[..., Workplace]]:
    """Starts workers of the test's database."""
    started: list[Workplace] = []

    def start(**settings: Any) -> Workplace:
        started.append(Workplace(db.dsn, **settings))
        return started[-1]

    yield start
    for workplace in started:
        workplace.close()
