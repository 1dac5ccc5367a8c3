"""examples/browser in headless Chromium: four Web Workers as a pool of four units, over Postgres in the page.

All checks use one page and so are one test: its first start, when Postgres makes its files, takes longest.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import accumulate
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page

UNITS = 4
QUICK = 6  # points per pixel and axis: tens of milliseconds of painting
PATIENCE = 120  # seconds that anything may take on a busy machine
LONG = {"samples": 40, "height": 8000}  # minutes of painting: such a task runs until it is stopped


class Visit:
    """A page of the example and what went wrong in it."""

    def __init__(self, page: Page, site: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(site)
        self.wait_until_ready()

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def wait_until_ready(self) -> str:
        """Returns the name of the page's worker, another one after each reload."""
        self.page.wait_for_selector("body[data-ready]")
        return str(self.page.evaluate("document.body.dataset.ready"))

    def sql(self, statement: str, *parameters: Any) -> list[dict[str, Any]]:
        rows = self.page.evaluate("([sql, params]) => lot.sql(sql, params)", [statement, list(parameters)])
        return list(rows)

    def value(self, statement: str, *parameters: Any) -> Any:
        (row,) = self.sql(statement, *parameters)
        (value,) = row.values()
        return value

    def submit(self, *tasks: dict[str, Any]) -> list[int]:
        """Submits pictures; the keys are arguments of `picture` in tasks.js. Returns their ids."""
        rows = self.page.evaluate(
            "async (tasks) => lot.submit(tasks.map((await import('./tasks.js')).picture))",
            [{"samples": QUICK, **task} for task in tasks],
        )
        assert all(row["accepted"] for row in rows), rows
        return [row["task_id"] for row in rows]

    def wait_for_sql(self, condition: str, *parameters: Any) -> None:
        """Waits until a statement that gives one boolean gives true."""
        seen = self.page.evaluate(
            """async ([sql, params, until]) => {
              for (;;) {
                const [row] = await lot.sql(sql, params);
                if (row && Object.values(row)[0]) return true;
                if (Date.now() > until) return false;
                await new Promise((resolve) => setTimeout(resolve, 100));
              }
            }""",
            [f"select {condition}", list(parameters), (time.time() + PATIENCE) * 1000],
        )
        assert seen, f"waited {PATIENCE} s in vain for: {condition} {parameters}"

    def wait_until_ended(self, tasks: list[int]) -> dict[int, dict[str, Any]]:
        """Waits for the outcomes of these tasks; returns their rows of park_status by id."""
        self.wait_for_sql(
            "count(*) = cardinality($1::bigint[]) from pgpark.mailbox where task_id = any ($1::bigint[])", tasks
        )
        ended = self.sql(
            "select s.*, extract(epoch from s.started_at)::float8 as started,"
            " extract(epoch from s.finished_at)::float8 as finished"
            " from unnest($1::bigint[]) as t (id) cross join lateral pgpark.park_status(t.id) s",
            tasks,
        )
        return {row["task_id"]: row for row in ended}

    def wait_until_running(self, task: int) -> None:
        self.wait_for_sql("status = 'running' from pgpark.park_status($1)", task)


def clear(visit: Visit) -> None:
    """Empties the lot; fails if the page complained about anything."""
    visit.sql("select pgpark.park_set_pool_state('browser', 'active')")
    visit.sql("select pgpark.park_cancel(task_id) from pgpark.task order by task_id desc")
    visit.wait_for_sql("count(*) = 0 from pgpark.task")
    visit.sql("select pgpark.park_ack(array(select message_id from pgpark.mailbox))")
    assert visit.complaints == []
    assert visit.page.locator("#message.trouble").count() == 0, visit.page.inner_text("#message")


def after(seconds: float) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


def most_units_at_once(tasks: list[dict[str, Any]]) -> int:
    """Replays starts and ends; at the same instant an end comes first."""
    ran = [task for task in tasks if task["started"] is not None]
    events = [(task["started"], 1, task["units"]) for task in ran] + [(t["finished"], 0, -t["units"]) for t in ran]
    return max(accumulate(units for _, _, units in sorted(events)))


def check_mixed_tasks_from_the_buttons_all_end_once_within_four_units(lot: Visit) -> None:
    assert sum("painter.js" in worker.url for worker in lot.page.workers) == UNITS
    lot.page.evaluate(
        """() => {
          window.samples = [];
          (async () => {
            while (window.samples) {
              const [row] = await lot.sql("select used_units, parked from pgpark.park_stats('browser')");
              window.samples?.push([row.used_units, row.parked]);
              await new Promise((resolve) => setTimeout(resolve, 50));
            }
          })();
        }"""
    )
    lot.page.click("#ten")
    lot.page.click("#critical")
    lot.wait_for_sql("count(*) = 11 from (select task_id from pgpark.task union select task_id from pgpark.mailbox) t")
    tasks = [
        row["task_id"] for row in lot.sql("select task_id from pgpark.task union select task_id from pgpark.mailbox")
    ]
    lot.page.wait_for_selector("#units .busy canvas")  # drawn while it is painted
    lot.page.wait_for_selector("#lanes .chip")
    ended = lot.wait_until_ended(tasks)

    assert lot.value("select count(*) from pgpark.task") == 0
    assert lot.value("select count(*) from pgpark.mailbox") == len(tasks) == 11
    assert {row["status"] for row in ended.values()} <= {"completed", "expired"}
    assert sum(row["status"] == "completed" for row in ended.values()) >= 10  # one has a short deadline
    samples = lot.page.evaluate("() => { const all = window.samples; window.samples = null; return all; }")
    assert max(used for used, _ in samples) <= UNITS
    assert max(parked for _, parked in samples) > 0
    assert 1 < most_units_at_once(list(ended.values())) <= UNITS
    lot.page.wait_for_selector("#outcomes .completed canvas")
    width, height, shades = lot.page.evaluate(
        "async (id) => { const [{ payload: p }] = await lot.sql('select payload from pgpark.park_result($1)', [id]);"
        " return [p.width, p.height, atob(p.shades).length]; }",
        next(id for id, row in ended.items() if row["status"] == "completed" and row["units"] > 1),
    )
    assert shades == width * height  # the shares of all workers are in it


def check_a_task_keeps_as_many_web_workers_busy_as_it_has_units(lot: Visit) -> None:
    (wide,) = lot.submit({"units": 3, **LONG})
    card = lot.page.locator(f"#units [data-task='{wide}']")
    card.wait_for()
    assert "span 3" in (card.get_attribute("style") or "")
    assert lot.page.locator("#units .idle").count() == 1
    lot.page.wait_for_function(  # each of them has painted: row y is the work of share y mod 3
        "() => { const c = document.querySelector('#units canvas'); if (!c) return false;"
        " const alpha = (y) => c.getContext('2d').getImageData(0, y, 1, 1).data[3];"
        " return alpha(0) && alpha(1) && alpha(2); }"
    )


def check_a_critical_task_overtakes_normal_ones(lot: Visit) -> None:
    (block,) = lot.submit({"units": 4, **LONG})
    lot.wait_until_running(block)
    normal = lot.submit(*[{"units": 2}] * 4)
    (critical,) = lot.submit({"units": 2, "priority": "critical"})
    lot.page.wait_for_selector(f"#lanes .lane.critical [data-task='{critical}']")
    lot.sql("select pgpark.park_cancel($1)", block)
    ended = lot.wait_until_ended([*normal, critical])
    assert all(ended[critical]["started"] <= ended[task]["started"] for task in normal)
    assert sum(ended[critical]["started"] < ended[task]["started"] for task in normal) >= 3


def check_a_head_that_is_too_wide_holds_capacity(lot: Visit) -> None:
    (block,) = lot.submit({"units": 1, **LONG})
    lot.wait_until_running(block)
    (head,) = lot.submit({"units": 4})
    (small,) = lot.submit({"units": 1})
    lot.page.wait_for_selector(f"#lanes [data-task='{head}'].head")
    why = lot.sql("select task_id, why from pgpark.park_explain('browser')")
    assert [(row["task_id"], row["why"]) for row in why] == [(head, "no units"), (small, "held for head")]
    assert lot.value("select used_units from pgpark.park_stats('browser')") == 1
    lot.sql("select pgpark.park_cancel($1)", block)
    ended = lot.wait_until_ended([block, head, small])
    assert ended[small]["started"] >= ended[head]["finished"]


def check_a_deadline_expires_without_anybody_asking(lot: Visit) -> None:
    (block,) = lot.submit({"units": 4, **LONG})
    lot.wait_until_running(block)
    (late,) = lot.submit({"deadline": after(1.5)})
    lot.page.wait_for_selector(f"#outcomes [data-task='{late}'].expired")
    row = lot.wait_until_ended([late])[late]
    assert (row["status"], row["reason"], row["started"]) == ("expired", "deadline_expired", None)
    assert lot.sql("select status from pgpark.park_status($1)", block) == [{"status": "running"}]


def check_a_running_task_is_cancelled_by_its_button_and_stops(lot: Visit) -> None:
    running, parked = lot.submit({"units": 4, **LONG}, {"units": 1})
    lot.page.click(f"#units [data-task='{running}'] .cancel")
    ended = lot.wait_until_ended([running, parked])
    assert (ended[running]["status"], ended[running]["reason"]) == ("dropped", "cancelled")
    assert ended[parked]["status"] == "completed"  # by a worker that had really stopped


def check_a_paused_lot_starts_nothing_until_it_is_resumed(lot: Visit) -> None:
    lot.page.click("#pause")
    lot.page.wait_for_selector("#pause[aria-pressed='true']")
    (task,) = lot.submit({})
    lot.page.wait_for_selector(f"#lanes [data-task='{task}']")
    assert lot.value("select why from pgpark.park_explain('browser')") == "paused"
    lot.page.click("#pause")
    assert lot.wait_until_ended([task])[task]["status"] == "completed"


def check_a_reload_loses_nothing(lot: Visit) -> None:
    (done,) = lot.submit({"units": 1})
    lot.wait_until_ended([done])
    # A lease that outlives the start of the next page, however slow: the lapse is forced below.
    longer = "config || '{\"lease_secs\": 600}'"
    lot.sql(f"select pgpark.park_put_pool('browser', {longer}) from pgpark.park_pools('browser')")
    (interrupted,) = lot.submit({"units": 3, **LONG})
    blocked = lot.submit({"units": 4}, {"units": 2, "priority": "low"})
    lot.wait_until_running(interrupted)
    before = lot.wait_until_ready()
    lot.page.reload()
    assert lot.wait_until_ready() != before
    assert lot.sql("select status from pgpark.park_result($1)", done) == [{"status": "completed"}]
    lot.page.wait_for_selector(f"#outcomes [data-task='{done}'] canvas")  # painted from the mailbox
    lot.page.wait_for_selector(f"#units .lost[data-task='{interrupted}']")
    assert lot.value("select used_units from pgpark.park_stats('browser')") == 3
    short = f'{{"samples": {QUICK}, "height": 48}}'  # so that the next attempt comes to its end
    lot.sql(
        "update pgmq.q_browser set message = jsonb_set(message, '{payload}', message -> 'payload' || $2::jsonb)"
        " where message #>> '{metadata,task_id}' = $1",
        str(interrupted),
        short,
    )
    lot.sql("update pgpark.task set lease_until = now() where task_id = $1", interrupted)
    lot.sql("select pg_notify('pgpark.pool.browser', '')")
    ended = lot.wait_until_ended([interrupted, *blocked])
    assert {row["status"] for row in ended.values()} == {"completed"}
    assert ended[interrupted]["attempt"] == 2
    assert [ended[task]["attempt"] for task in blocked] == [1, 1]


def check_a_second_tab_waits_for_the_first(lot: Visit) -> None:
    second = lot.page.context.new_page()
    second.goto(lot.page.url)
    second.wait_for_function("document.getElementById('message').textContent.includes('another tab')")
    assert second.locator("#ten").is_disabled()
    second.close()


CHECKS: list[Callable[[Visit], None]] = [
    check_mixed_tasks_from_the_buttons_all_end_once_within_four_units,
    check_a_task_keeps_as_many_web_workers_busy_as_it_has_units,
    check_a_critical_task_overtakes_normal_ones,
    check_a_head_that_is_too_wide_holds_capacity,
    check_a_deadline_expires_without_anybody_asking,
    check_a_running_task_is_cancelled_by_its_button_and_stops,
    check_a_paused_lot_starts_nothing_until_it_is_resumed,
    check_a_second_tab_waits_for_the_first,
    check_a_reload_loses_nothing,
]


def test_four_web_workers_are_a_pool_of_four_units(chromium: Browser, site: str) -> None:
    context = chromium.new_context()
    visit = Visit(context.new_page(), site)
    for check in CHECKS:
        sys.stdout.write(f"{time.strftime('%X')} {check.__name__}\n")  # shown with a failure
        check(visit)
        clear(visit)
    context.close()
