"""The live page in Chromium, with a gateway, a database and a worker behind it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import Database, wait_for
from tests.gateway.conftest import Gateway
from tests.page.conftest import Workplace

Visit = Callable[..., Page]
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


def width_of(page: Page, selector: str) -> float:
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    return box["width"]


def test_a_task_parks_runs_in_a_car_as_wide_as_its_units_and_lands_in_the_mailbox(
    db: Database, visit: Visit, workplaces: Callable[..., Workplace]
) -> None:
    db.pool(max_units=12)
    page = visit()
    expect(page.locator("#sentence")).to_have_text("Nothing runs. Nothing waits.")
    assert page.evaluate("location.hash") == "#pool=gpu", "the token is not left in the address"

    wide, narrow = db.parked(payload="wide", units=8, tenant="acme"), db.parked(payload="narrow", units=2)
    head = db.parked(payload="head", units=4, priority="low")
    expect(page.locator(f".lane.normal .car[data-task='{wide}']")).to_be_visible()
    expect(page.locator("#sentence")).to_contain_text("3 wait: no worker has been seen")
    expect(page.locator("#charts svg")).to_have_count(2)

    workplace = workplaces()
    expect(page.locator(f"#lot .car[data-task='{wide}']")).to_be_visible()
    ratio = width_of(page, f"#lot .car[data-task='{wide}']") / width_of(page, f"#lot .car[data-task='{narrow}']")
    assert ratio == pytest.approx(4, rel=0.02)
    expect(page.locator(f".lane.low .car.head[data-task='{head}']")).to_be_visible()
    expect(page.locator("#sentence")).to_have_text(
        f"2 tasks hold 10 of 12 units. 1 waits: task {head} is at the head and needs 4 units, 2 are free."
    )
    expect(page.locator(f"#lot .car[data-task='{wide}']")).to_have_accessible_name(
        re.compile(f"task {wide}, 8 units, normal, acme, runs for .* on live-worker")
    )

    workplace.end("wide")
    expect(page.locator(f"#mailbox [data-task='{wide}']")).to_contain_text("completed")
    expect(page.locator(f"#lot .car[data-task='{head}']")).to_be_visible()
    for payload in ("narrow", "head"):
        workplace.end(payload, "out of memory")
    expect(page.locator("#failures")).to_contain_text("RuntimeError: out of memory")
    expect(page.locator("#failures .count")).to_have_text(re.compile("2$"))


def test_an_admin_pauses_resumes_and_resizes(db: Database, visit: Visit) -> None:
    db.pool(max_units=12)
    page = visit()

    def of_pool(column: str) -> Any:
        return db.value(f"select {column} from pgpark.pool where name = 'gpu'")

    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Leave it").click()
    assert of_pool("state") == "active", "it was only asked"
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    expect(page.locator("#state")).to_have_text("paused")
    assert of_pool("state") == "paused"
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#state")).to_have_text("active")
    assert of_pool("state") == "active"

    page.get_by_role("button", name="Resize…").click()
    page.get_by_label("Units", exact=True).fill("30")
    page.get_by_role("dialog").get_by_role("button", name="Resize").click()
    expect(page.locator("#scale")).to_contain_text("0 of 30 units")
    assert of_pool("max_units") == 30


def test_tasks_are_cancelled_and_tried_again(db: Database, visit: Visit, workplaces: Callable[..., Workplace]) -> None:
    db.pool(max_units=4, archive=True, retry={"max_attempts": 2, "backoff_secs": 1000, "max_backoff_secs": 1000})
    workplace = workplaces(units=4)
    failing = db.parked(payload="failing", units=4)
    waiting = db.parked(payload="waiting")
    page = visit()
    page.locator(f".lane .car[data-task='{waiting}']").click()
    page.get_by_role("button", name="Cancel this task").click()
    page.get_by_role("button", name="Cancel the task").click()
    expect(page.locator(f"#mailbox [data-task='{waiting}']")).to_contain_text("dropped")
    assert db.outcome(waiting) == ("dropped", "cancelled")

    workplace.end("failing", "no luck")
    page.locator(f"#delayed .car[data-task='{failing}']").click()
    page.get_by_role("button", name="Retry now").click()
    expect(page.locator(f"#mailbox [data-task='{failing}']")).to_contain_text("failed")
    assert db.status(failing)["attempt"] == 2, "it did not wait for its backoff"

    page.locator(f"#mailbox [data-task='{failing}']").click()
    page.get_by_role("button", name="Retry now").click()
    again = re.compile(rf"Task {failing} is submitted once more, as task (\d+)")
    expect(page.get_by_text(again)).to_be_visible()
    found = again.search(page.locator("#toasts").inner_text())
    assert found and db.status(int(found[1]))["pool"] == "gpu"

    running = db.parked(payload="running", units=4)
    page.locator(f"#lot .car[data-task='{running}']").click()
    page.get_by_role("button", name="Cancel this task").click()
    page.get_by_role("button", name="Cancel the task").click()
    expect(page.locator(f"#mailbox [data-task='{running}']")).to_contain_text("dropped")


def test_a_reader_gets_no_buttons_and_no_words_of_handlers(db: Database, visit: Visit) -> None:
    db.pool(max_units=4, archive=True)
    task = db.parked()
    db.claim()
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'customer 42')", task)
    waiting = db.parked()
    page = visit("reader")
    expect(page.locator("#failures")).to_contain_text("no reason shown")
    expect(page.locator("#mailbox")).to_contain_text("no reason shown")
    for name in ("Pause", "Resize…", "Retry latest"):
        expect(page.get_by_role("button", name=name)).to_have_count(0)
    page.locator(f".lane .car[data-task='{waiting}']").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.get_by_role("dialog").get_by_role("button")).to_have_text(["Close"])
    assert "customer 42" not in page.content()


def test_a_producer_of_a_tenant_sees_and_cancels_its_own(db: Database, visit: Visit) -> None:
    db.pool(max_units=4)
    mine, theirs = db.parked(tenant="acme"), db.parked(tenant="globex")
    page = visit("producer", scope={"tenants": ["acme"]})
    expect(page.locator(".lane .car")).to_have_count(1)
    expect(page.locator("#own")).to_have_text("only tasks of acme")
    expect(page.locator("#workers-card")).to_be_hidden()
    assert "globex" not in page.content()
    expect(page.locator(f"[data-task='{theirs}']")).to_have_count(0)
    page.locator(f".lane .car[data-task='{mine}']").click()
    page.get_by_role("button", name="Cancel this task").click()
    page.get_by_role("button", name="Cancel the task").click()
    expect(page.locator(f"#mailbox [data-task='{mine}']")).to_contain_text("dropped")


def test_names_with_html_in_them_are_only_names(db: Database, visit: Visit) -> None:
    db.pool(max_units=8)
    running, failing = db.parked(tenant=HOSTILE, units=2), db.parked(tenant=HOSTILE)
    db.claim(worker=HOSTILE, max_units=8)
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, %s)", failing, HOSTILE)
    db.parked(tenant=HOSTILE + "2")
    page = visit()
    for place in ("#tenants", "#workers", "#failures", "#legend"):
        expect(page.locator(place)).to_contain_text("<img src=x onerror=")
    page.locator(f"#lot .car[data-task='{running}']").click()
    expect(page.get_by_role("dialog")).to_contain_text("<script>")
    assert page.locator("img").count() == 0 and page.locator("body script").count() == 0
    assert page.title().startswith("gpu:")


def test_a_name_from_right_to_left_does_not_turn_the_words_around_it(db: Database, visit: Visit) -> None:
    db.pool(max_units=8)
    name = "\u0645\u0633\u062a\u0623\u062c\u0631 \u202eevil"
    db.parked(tenant=name)
    page = visit("producer", scope={"tenants": [name]})
    expect(page.locator("#own")).to_have_text(f"only tasks of \u2068{name}\u2069")
    expect(page.locator("#sentence")).to_have_text(f"Nothing of \u2068{name}\u2069 runs. 1 waits.")


def test_those_that_are_not_shown_are_counted(db: Database, visit: Visit) -> None:
    db.pool(max_units=24)
    for number in range(12):
        db.parked(tenant=f"tenant {number:02}")
        db.claim(worker=f"worker {number:02}", max_tasks=1)
    page = visit()
    expect(page.locator("#workers .share")).to_have_count(10)
    expect(page.locator("#workers")).to_contain_text("and 2 others")
    expect(page.locator("#tenants")).to_contain_text("and 4 others")


def test_who_is_at_a_task_that_ends_is_at_the_next_one(db: Database, visit: Visit) -> None:
    db.pool(max_units=4)
    tasks = [db.parked(units=4) for _ in range(3)]
    page = visit()
    page.locator(f".car[data-task='{tasks[1]}']").focus()
    db.rows("select pgpark.park_cancel(%s)", tasks[1])
    expect(page.locator(f".lane .car[data-task='{tasks[2]}']")).to_be_focused()
    db.rows("select pgpark.park_cancel(%s)", tasks[2])
    expect(page.locator(f".lane .car[data-task='{tasks[0]}']")).to_be_focused()
    db.rows("select pgpark.park_cancel(%s)", tasks[0])
    expect(page.locator("#scene")).to_be_focused()


def test_without_pools_it_says_so_to_who_has_signed_in(visit: Visit, gateway: Gateway) -> None:
    page = visit(secret="")
    page.goto(f"{gateway.url}/?")  # no pool is asked for
    page.get_by_label("Token").fill(gateway.secret("admin"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#banner")).to_contain_text("There are no pools yet")
    expect(page.locator("#sign-in")).to_be_hidden()
    page.get_by_role("button", name="Sign out").click()
    expect(page.locator("#sign-in")).to_be_visible()


def test_everything_can_be_reached_with_the_keyboard(db: Database, visit: Visit) -> None:
    db.pool(max_units=4)
    db.pool("other", max_units=4)
    tasks = [db.parked(priority="high") for _ in range(3)]
    page = visit()
    expect(page.locator(".lane.high .car")).to_have_count(3)

    def tab_to(selector: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not come to {selector}")

    tab_to("#pools a")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab_to(".lane.high .car")
    page.keyboard.press("ArrowLeft")  # away from the lot, towards the end of the line
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name=f"Task {tasks[1]}")).to_be_visible()
    tab_to("dialog button[value=cancel]")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name=f"Cancel task {tasks[1]}?")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert db.status(tasks[1])["status"] == "parked"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_scrolling_sideways(db: Database, visit: Visit, scheme: str) -> None:
    db.pool(max_units=1_000_000, tenants={"t" * 200: {"max_units": 500_000}})
    db.pool("p" * 40, max_units=1)
    for number in range(60):
        db.parked(units=1 + number * 900, tenant="t" * 200 if number % 2 else None, priority="high")
    db.claim(worker="w" * 200, max_tasks=30)
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for pool in ("p" * 40, "gpu"):
        page.evaluate(f"location.hash = 'pool={pool}'")
        expect(page.locator("#pool-name")).to_have_text(pool)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.locator("#lot .car").first).to_be_visible()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 24)"
    assert dark == (scheme == "dark")
    if scheme == "dark":
        page.get_by_label("Switch between light and dark").click()
        page.reload()
        expect(page.locator("#lot .car").first).to_be_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(243, 244, 246)", "it is kept"


def test_text_has_enough_contrast_in_light_and_dark(db: Database, visit: Visit) -> None:
    db.pool(max_units=8)
    db.parked(units=3, tenant="acme")
    db.claim(max_units=8)
    db.parked(units=8)
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        expect(page.locator("#lot .car")).to_be_visible()
        expect(page.locator(".lane .car")).to_be_visible()
        assert page.evaluate(CONTRAST) == []


# Text whose contrast with the nearest background is below 4.5 to 1, or 3 to 1 where it is large. Cars have their colour
# from a pseudo-element.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      for (const pseudo of at.classList.contains("car") ? ["::before"] : [null]) {
        const colour = parse(getComputedStyle(at, pseudo).backgroundColor);
        if (colour.length === 3 || colour[3] === 1) return colour;
      }
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility() || node.closest(".skip, .unseen")) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(parse(style.color)), light(ground(node))].sort((x, y) => y - x);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    const text = walker.currentNode.textContent;
    if (ratio < (large ? 3 : 4.5)) poor.push(`${node.className || node.tagName}: ${text} ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def test_a_token_that_is_revoked_or_wrong_is_asked_for_again(db: Database, visit: Visit, gateway: Gateway) -> None:
    db.pool()
    page = visit(secret="", expected=("401",))
    page.get_by_label("Token").fill("park_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert").filter(has_text="not known here")).to_be_visible()
    page.get_by_label("Token").fill(gateway.secret("reader"))
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#pool-name")).to_have_text("gpu")
    db.rows("select pgpark.park_revoke_token(name) from pgpark.park_tokens()")
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_lost_connection_is_said_and_found_again(db: Database, visit: Visit) -> None:
    db.pool()
    page = visit(expected=("ERR_", "503"))
    expect(page.locator("#link-text")).to_have_text("live")
    page.context.set_offline(True)
    expect(page.locator("#banner")).to_contain_text("Connection lost")
    page.context.set_offline(False)
    expect(page.locator("#link-text")).to_have_text("live")
    expect(page.locator("#banner")).to_be_hidden()


def test_what_a_token_may_not_see_is_said(db: Database, visit: Visit) -> None:
    db.pool()
    db.pool("cpu")
    page = visit("reader", scope={"pools": ["cpu"]}, expected=("403",))
    expect(page.locator("#banner")).to_contain_text("This token may not see that")
    page.get_by_role("link", name="cpu").click()
    expect(page.locator("#pool-name")).to_have_text("cpu")


def test_the_page_may_load_nothing_from_elsewhere_and_run_nothing_inline(gateway: Gateway) -> None:
    client = gateway.client(secret="")
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "<script>" not in answer.text and "style=" not in answer.text and "://" not in answer.text
    for name in re.findall(r'"(/page/[^"]+)"', answer.text):
        file = client.get(name)
        assert file.status_code == 200
        assert client.get(name, headers={"If-None-Match": file.headers["etag"]}).status_code == 304
    assert client.get("/page/../app.py").status_code in (401, 404)
    assert client.get("/page/%2e%2e%2fapp.py").status_code in (401, 404)


def test_a_retry_says_why_it_is_refused(db: Database, gateway: Gateway) -> None:
    db.pool()
    admin = gateway.client()
    task = db.parked()
    answer = admin.post(f"/pools/gpu/tasks/{task}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ended")
    db.claim()
    db.finish(task, status="failed")
    answer = admin.post(f"/pools/gpu/tasks/{task}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "payload_gone")
    assert admin.post("/pools/gpu/tasks/987654/retry").status_code == 404
    assert admin.post(f"/pools/other/tasks/{task}/retry").status_code == 404
    assert gateway.client("reader").post(f"/pools/gpu/tasks/{task}/retry").status_code in (403, 404)
    wait_for(lambda: admin.get("/pools/gpu/lot").json()["mailbox"]["latest"][0]["task_id"] == task)
    assert admin.get("/pools/gpu/lot?max_tasks=0").status_code == 400
