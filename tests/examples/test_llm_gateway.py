"""examples/llm_gateway: a real gateway, a real worker and the stand-in talk over HTTP, in threads of this process; the
memory experiment runs as its users run it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from pgpark import LlmCostModel, build_pools
from tests.conftest import Database, wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm_gateway"
sys.path.insert(0, str(EXAMPLE))

import callers  # noqa: E402
import chunks  # noqa: E402
import gateway  # noqa: E402
import standin  # noqa: E402
import tokens  # noqa: E402
import worker  # noqa: E402

CHAT = "/v1/chat/completions"
CONFIG = json.loads((EXAMPLE / "pools.json").read_text())["pools"]["llm"]
COST = LlmCostModel.from_config(CONFIG["cost_model"])
WEIGHTS = int((COST.weights_gb or 0) * (1 << 30))


class Served:
    """An application on a port of its own, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)


class Lot:
    """The pool `llm` of a database, a gateway for it, and workers in front of a model server."""

    def __init__(self, dsn: str, upstream: str, keys: Path | None, with_worker: bool, **config: Any) -> None:
        self.pools = build_pools({"pools": {"llm": CONFIG | {"fairness": "fifo"} | config}}, dsn=dsn)
        settings = gateway.Settings(upstream=upstream, tokens="server", retry_after_secs=3)
        app = gateway.create_app({"pools": {"llm": CONFIG | {"fairness": "fifo"} | config}}, "llm", settings,
                                 callers.Keys(keys), dsn)  # fmt: skip
        self._gateway = Served(app)
        self.http = httpx.Client(base_url=self._gateway.url, timeout=30)
        self._worker = self.pools["llm"].worker(worker.run, concurrency=16, grace_secs=0) if with_worker else None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        if self._worker is not None:
            self._loop = asyncio.new_event_loop()
            self._loop.run_until_complete(self._worker.serve())
            self._loop.close()

    def close(self) -> None:
        self.http.close()
        self._gateway.close()
        if self._worker is not None:
            self._loop.call_soon_threadsafe(self._worker.stop)
        self._thread.join(20)
        self.pools.close()


@pytest.fixture
def model() -> Iterator[standin.Server]:
    """The model of the stand-in, in this process and without a limit; quick."""
    yield standin.Server(COST, standin.Card(1 << 30, "ram"), speed=200, load_secs=0)


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an application; its URL."""
    served: list[Served] = []

    def start(app: FastAPI) -> str:
        served.append(Served(app))
        return served[-1].url

    yield start
    for one in served:
        one.close()


@pytest.fixture
def park(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Lot]]:
    """Opens the lot in front of a model server."""
    opened: list[Lot] = []

    def start(upstream: str, keys: Path | None = None, with_worker: bool = True, **config: Any) -> Lot:
        monkeypatch.setenv("LLM_UPSTREAM", upstream)
        worker._client.cache_clear()
        opened.append(Lot(dsn, upstream, keys, with_worker, **config))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def lot(park: Callable[..., Lot], serve: Callable[[FastAPI], str], model: standin.Server) -> Lot:
    """The lot in front of the stand-in."""
    return park(serve(standin.create_app(model)))


def ask(content: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "stand-in", "messages": [{"role": "user", "content": content}], "max_tokens": 20} | more


def events(response: httpx.Response) -> Iterator[Any]:
    """The data of a stream, as it comes."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_a_stream_comes_in_order_as_the_server_sent_it(lot: Lot, db: Database) -> None:
    with lot.http.stream("POST", CHAT, json=ask(stream=True)) as response:
        *received, done = events(response)
    assert (response.status_code, done) == (200, "[DONE]")
    assert response.headers["content-type"].startswith("text/event-stream")
    words = text(received).split()
    assert words == [str(number) for number in range(1, len(words) + 1)] and len(words) >= 8
    assert received[0]["choices"][0]["delta"]["role"] == "assistant"
    assert received[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in received)  # nobody asked for it
    wait_for(lambda: db.rows("select * from pgpark.mailbox") == [])  # delivered, so nothing waits


def test_an_answer_that_was_taken_whole_is_taken_out_of_the_mailbox(lot: Lot, db: Database) -> None:
    assert lot.http.post(CHAT, json=ask()).status_code == 200
    assert lot.http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    wait_for(lambda: db.rows("select * from pgpark.mailbox") == [])


def test_an_answer_that_was_not_taken_whole_stays(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str], db: Database
) -> None:
    app = FastAPI()
    app.post(CHAT)(lambda: JSONResponse({"text": "x" * (8 << 20)}))
    lot = park(serve(app))
    small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)])
    with (
        httpx.Client(base_url=lot.http.base_url, transport=small, timeout=30) as http,
        http.stream("POST", CHAT, json=ask()) as response,
    ):
        handle = response.headers["X-Pgpark-Task"]  # and leaves; the system cannot hold all of it for a client
    assert len(lot.http.get(f"/v1/pgpark/results/{handle}").content) > 8 << 20
    assert db.value("select count(*) from pgpark.mailbox") == 1


def test_usage_is_told_to_who_asks(lot: Lot) -> None:
    with lot.http.stream("POST", CHAT, json=ask(stream=True, stream_options={"include_usage": True})) as response:
        *received, _ = events(response)
    assert received[-1]["choices"] == []
    assert received[-1]["usage"]["prompt_tokens"] == standin.count_tokens("hello")
    answer = lot.http.post(CHAT, json=ask()).json()
    assert answer["object"] == "chat.completion" and answer["usage"] == received[-1]["usage"]
    assert answer["choices"][0]["message"]["content"] == text(received)  # the same prompt


def test_completions_embeddings_and_models_are_served_too(lot: Lot) -> None:
    completion = lot.http.post("/v1/completions", json={"prompt": "once", "max_tokens": 5}).json()
    assert completion["choices"][0]["text"].startswith(" 1")
    assert len(lot.http.post("/v1/embeddings", json={"input": ["a", "b"]}).json()["data"]) == 2
    assert lot.http.get("/v1/models").json()["data"][0]["id"] == standin.MODEL


def test_a_request_is_charged_by_the_cost_model(park: Callable[..., Lot], db: Database) -> None:
    lot = park("http://127.0.0.1:9", with_worker=False)
    body = ask("x" * 3000, max_completion_tokens=100, n=2, pgpark={"deadline_secs": 2})
    waiting = threading.Thread(target=lambda: lot.http.post(CHAT, json=body))
    waiting.start()
    (task,) = wait_for(lambda: db.rows("select units from pgpark.task"))
    prompt_tokens = 1000 + 8  # by the estimate, since nobody answers at /tokenize
    assert task["units"] == COST.units(prompt_tokens, min(20, 100) * 2)
    waiting.join()


def test_who_left_finds_the_answer_later(lot: Lot, db: Database) -> None:
    body = ask(stream=True, user="ada", max_tokens=100, pgpark={"on_disconnect": "keep"})
    with lot.http.stream("POST", CHAT, json=body) as response:
        handle = response.headers["X-Pgpark-Task"]
        next(events(response))
    pending = lot.http.get(f"/v1/pgpark/results/{handle}")
    assert pending.status_code in (200, 202)
    answer = lot.http.get(f"/v1/pgpark/results/{handle}", params={"wait": 20})
    assert answer.status_code == 200 and answer.json()["object"] == "chat.completion"
    said = answer.json()["choices"][0]["message"]["content"]
    assert len(said.split()) >= 40
    with lot.http.stream("GET", f"/v1/pgpark/results/{handle}", params={"stream": "true"}) as response:
        *again, done = events(response)
    assert text(again) == said and done == "[DONE]"
    listed = lot.http.get("/v1/pgpark/mailbox", params={"user": "ada"}).json()["data"]
    assert [(entry["id"], entry["status"]) for entry in listed] == [(handle, "completed")]
    assert lot.http.delete(f"/v1/pgpark/results/{handle}").json() == {"result": "deleted"}
    assert lot.http.get(f"/v1/pgpark/results/{handle}").status_code == 404
    assert db.rows("select * from pgpark.mailbox") == []


def test_the_memory_of_who_leaves_is_freed(lot: Lot, model: standin.Server, db: Database) -> None:
    with lot.http.stream("POST", CHAT, json=ask(stream=True, max_tokens=1000)) as response:
        task_id = int(response.headers["X-Pgpark-Task"].partition("-")[0])
        next(events(response))
        assert model.card.held_bytes == WEIGHTS + COST.units(2, 1000) * COST.unit_bytes
    wait_for(lambda: model.card.held_bytes == WEIGHTS, 10)
    assert model.abandoned == 1
    assert wait_for(lambda: db.rows("select status, reason from pgpark.park_result(%s)", task_id)) == [
        {"status": "dropped", "reason": "its client went away"}
    ]
    assert db.value("select used_units from pgpark.park_stats('llm')") == 0


def test_who_leaves_while_not_streaming_is_noticed_too(lot: Lot, model: standin.Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        lot.http.post(CHAT, json=ask(max_tokens=1000), timeout=0.7)
    wait_for(lambda: model.abandoned == 1 and model.card.held_bytes == WEIGHTS, 10)


def test_a_full_lot_answers_429_and_when_to_come_back(park: Callable[..., Lot]) -> None:
    lot = park("http://127.0.0.1:9", with_worker=False, max_queue_depth=1)
    waiting = threading.Thread(target=lambda: lot.http.post(CHAT, json=ask(pgpark={"deadline_secs": 3})))
    waiting.start()
    wait_for(lambda: lot.http.get("/health").json()["parked"] == 1)
    for stream in (False, True):
        answer = lot.http.post(CHAT, json=ask(stream=stream))
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "3")
        assert answer.json()["error"]["code"] == "queue_full" and answer.json()["error"]["type"] == "rate_limit_error"
    waiting.join()


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_is_told_politely(park: Callable[..., Lot], stream: bool) -> None:
    lot = park("http://127.0.0.1:9", with_worker=False)
    answer = lot.http.post(CHAT, json=ask(stream=stream), headers={"X-Pgpark-Deadline": "0.2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_expired")
    assert answer.headers["x-should-retry"] == "false"  # else OpenAI's clients would by themselves


class Breaking:
    """A server whose first answers break off after so many chunks, each; then it answers."""

    def __init__(self, *breaks: int) -> None:
        self.breaks, self.asked = list(breaks), 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post(CHAT)
        async def chat(_: Request) -> Response:
            self.asked += 1
            stop = self.breaks.pop(0) if self.breaks else None
            if stop == -1:
                return JSONResponse({"error": {"message": "loading"}}, 503)
            return StreamingResponse(self._answer(stop, self.asked), media_type="text/event-stream")

        return app

    async def _answer(self, stop: int | None, attempt: int) -> AsyncIterator[str]:
        for number in range(4):
            if number == stop:
                await asyncio.sleep(0.3)  # until what came before has been read
                raise ConnectionAbortedError
            choice = {"index": 0, "delta": {"content": f" {attempt}.{number}"}, "finish_reason": None}
            yield f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"


RETRY = {"retry": {"max_attempts": 3, "backoff_secs": 0.1}}


def test_what_breaks_before_the_first_token_is_tried_again_unseen(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str]
) -> None:
    server = Breaking(-1, 0)
    lot = park(serve(server.app()), **RETRY)
    with lot.http.stream("POST", CHAT, json=ask(stream=True)) as response:
        *received, done = events(response)
    assert (text(received), done, server.asked) == (" 3.0 3.1 3.2 3.3", "[DONE]", 3)


@pytest.mark.parametrize("wish", ["keep", "cancel"])
def test_an_answer_that_breaks_off_in_the_middle_is_not_begun_twice(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str], wish: str
) -> None:
    lot = park(serve(Breaking(2).app()), **RETRY)
    with lot.http.stream("POST", CHAT, json=ask(stream=True, pgpark={"on_disconnect": wish})) as response:
        *received, error, done = events(response)
        handle = response.headers["X-Pgpark-Task"]
    assert text(received) == " 1.0 1.1" and done == "[DONE]"
    assert error["error"]["code"] == "upstream_interrupted"
    later = lot.http.get(f"/v1/pgpark/results/{handle}", params={"wait": 20})
    if wish == "keep":
        assert handle in error["error"]["message"]
        assert later.json()["choices"][0]["message"]["content"] == " 2.0 2.1 2.2 2.3"
    else:
        assert later.status_code in (200, 409)  # it may have been quicker than the cancel


def test_a_server_that_is_down_answers_502_after_its_retries(park: Callable[..., Lot]) -> None:
    lot = park("http://127.0.0.1:9", retry={"max_attempts": 2, "backoff_secs": 0.1})
    for stream in (False, True):
        answer = lot.http.post(CHAT, json=ask(stream=stream))
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")
        assert "ConnectError" in answer.json()["error"]["message"]
    assert lot.http.get("/v1/models").status_code == 502


def test_what_the_server_refuses_is_passed_on(lot: Lot) -> None:
    answer = lot.http.post("/v1/embeddings", json={"input": [1, 2]})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("input must be")
    assert lot.http.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_bad_input_is_one_line_in_the_shape_of_openai(lot: Lot) -> None:
    wrong: list[tuple[Any, str]] = [
        (ask(max_tokens=0), "invalid_value"),
        (ask(max_tokens=True), "invalid_value"),
        (ask(messages=[]), "invalid_value"),
        (ask(messages=["hello"]), "invalid_value"),
        (ask(max_tokens=1_000_000), "context_length_exceeded"),
        (ask(pgpark={"priority": "urgent"}), "invalid_option"),
        (ask(pgpark={"when": "now"}), "invalid_option"),
        (ask(pgpark={"deadline_secs": 0}), "invalid_option"),
        (ask(pgpark=7), "invalid_option"),
        (ask(stream_options=7, stream=True), "invalid_value"),
        (ask("a NUL \x00"), "invalid_value"),
        (ask(user="a NUL \x00"), "invalid_value"),
        (ask(pgpark={"session": "half a pair \ud83d"}), "invalid_value"),
        ([1], "invalid_json"),
    ]
    for body, code in wrong:
        answer = lot.http.post(CHAT, content=json.dumps(body))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), body
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
        assert "\n" not in answer.json()["error"]["message"]
    assert lot.http.post(CHAT, content=b"{").json()["error"]["code"] == "invalid_json"
    assert lot.http.post("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert lot.http.get("/v1/pgpark/results/x").json()["error"]["code"] == "result_not_found"
    for query in ({"limit": "x"}, {"user": "\0"}, {"since": "\0"}):
        assert lot.http.get("/v1/pgpark/mailbox", params=query).status_code == 400
    assert lot.http.get(CHAT).json()["error"]["code"] == "method_not_allowed"


def test_a_request_that_is_too_large_is_not_read_to_its_end(lot: Lot) -> None:
    most = gateway.Settings().max_body_mb << 20
    answer = lot.http.post(CHAT, content=b" " * (most + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_model_is_no_way_to_what_else_the_server_has(lot: Lot) -> None:
    for path in ("..%2f..%2fstats", "x%2f..%2f..%2f..%2fstats", "%2e%2e/..%2fstats"):
        answer = lot.http.get(f"/v1/models/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path
    assert lot.http.get("/v1/models/a%3fb").status_code == 404  # the server's own answer


def test_tenants_are_told_apart_by_their_keys(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str], model: standin.Server, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"sk-1": "acme", "sk-2": "acme", "sk-3": {"tenant": "else", "max_priority": "normal"}}))
    lot = park(serve(standin.create_app(model)), keys=keys)

    def bearer(key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    assert lot.http.post(CHAT, json=ask()).json()["error"]["code"] == "invalid_api_key"
    assert lot.http.post(CHAT, json=ask(), headers=bearer("sk-4")).status_code == 401
    high = ask(pgpark={"priority": "high"})
    assert lot.http.post(CHAT, json=high, headers=bearer("sk-3")).json()["error"]["code"] == "priority_not_allowed"
    first = lot.http.post(CHAT, json=high, headers=bearer("sk-1") | {"Idempotency-Key": "k"})
    handle = first.headers["X-Pgpark-Task"]
    seen = {key: lot.http.get(f"/v1/pgpark/results/{handle}", headers=bearer(key)).status_code for key in _KEYS}
    assert seen == {"sk-1": 200, "sk-2": 200, "sk-3": 404}
    assert lot.http.get("/v1/pgpark/mailbox", headers=bearer("sk-3")).json()["data"] == []
    # While it lives, only the key that submitted it may follow it.
    with lot.http.stream("POST", CHAT, json=ask(stream=True, max_tokens=400), headers=bearer("sk-1")) as response:
        living = response.headers["X-Pgpark-Task"].partition("-")[0]
        for handle in (living, f"{living}-{'0' * 32}"):
            assert lot.http.get(f"/v1/pgpark/results/{handle}", headers=bearer("sk-3")).status_code == 404


_KEYS = ("sk-1", "sk-2", "sk-3")


def test_the_same_idempotency_key_gets_the_same_answer(lot: Lot, model: standin.Server) -> None:
    with lot.http.stream("POST", CHAT, json=ask(stream=True), headers={"Idempotency-Key": "once"}) as response:
        *received, _ = events(response)
    with lot.http.stream("POST", CHAT, json=ask(stream=True), headers={"Idempotency-Key": "once"}) as response:
        *again, done = events(response)
    assert again == received and done == "[DONE]" and model.served == 1


def test_who_gave_an_idempotency_key_and_lost_the_connection_gets_the_answer(lot: Lot) -> None:
    key = {"Idempotency-Key": "once"}
    with lot.http.stream("POST", CHAT, json=ask(stream=True, max_tokens=200), headers=key) as response:
        next(events(response))
    answer = lot.http.post(CHAT, json=ask(max_tokens=200), headers=key)
    assert answer.status_code == 200 and len(answer.json()["choices"][0]["message"]["content"].split()) >= 80


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"index":0,"delta":{"content":"a\xe2\x80\xa8b\xc2\x85c"}}]}\r\n\r\n',  # no ends of lines
        b'data: {"choices":[{"index":0,"delta":{"content":"a\\u0000b\\ud83dc"},"logprobs":{"x":-Infinity}}]}\n\n',
    ],
)
def test_whatever_a_model_writes_is_passed_on(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str], event: bytes
) -> None:
    app = FastAPI()
    head = {"media_type": "text/event-stream"}
    app.post(CHAT)(lambda: StreamingResponse(iter([event[:50], event[50:], b"data: [DONE]"]), **head))
    lot = park(serve(app))
    with lot.http.stream("POST", CHAT, json=ask(stream=True)) as response:
        body = response.read().decode()
    received = json.loads(body.split("\n\n")[0].removeprefix("data: "))
    said = received["choices"][0]["delta"]["content"]
    assert said in ("a\u2028b\x85c", "a\ufffdb\ufffdc") and body.endswith("data: [DONE]\n\n")
    assert lot.http.post(CHAT, json=ask()).json()["choices"][0]["message"]["content"] == said


@pytest.mark.parametrize("event", ["[1]", "5", "null", '"error"'])
def test_what_is_no_chunk_fails_the_attempt(
    park: Callable[..., Lot], serve: Callable[[FastAPI], str], event: str
) -> None:
    app = FastAPI()
    app.post(CHAT)(lambda: StreamingResponse(iter([f"data: {event}\n\n"]), media_type="text/event-stream"))
    lot = park(serve(app), retry={"max_attempts": 1})
    answer = lot.http.post(CHAT, json=ask(stream=True))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_failed")


def test_the_estimate_counts_bytes_and_digits() -> None:
    assert [tokens.estimate(text) for text in ("", "a", "abc", "abcd", "12345", "abc12", "\u8f66\u4f4d")] == [
        0,
        1,
        1,
        2,
        5,
        3,
        2,
    ]


def test_chunks_make_the_answer_that_would_have_come_whole() -> None:
    def chunk(**choice: Any) -> dict[str, Any]:
        return {"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": None} | choice]}

    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a"'}}
    whole = chunks.whole(
        [
            chunk(delta={"role": "assistant", "content": None, "tool_calls": [call]}),
            chunk(delta={"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}),
            chunk(delta={"reasoning_content": "so"}, logprobs={"content": [{"token": "a"}]}),
            chunk(delta={"reasoning_content": " be it"}, logprobs={"content": [{"token": "b"}]}),
            chunk(delta={}, finish_reason="tool_calls"),
            {"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": {"total_tokens": 3}},
        ]
    )
    assert whole["object"] == "chat.completion" and whole["usage"] == {"total_tokens": 3}
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "so be it",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }


def test_a_request_without_max_tokens_is_held_to_what_it_is_charged() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}, {"type": "image_url"}]}]}
    counted = tokens.read(CHAT, body, 77)
    assert (counted.texts, counted.known, counted.max_tokens) == (["abc"], 8 + 1024, 77)
    assert body["max_tokens"] == 77
    counted = tokens.read("/v1/completions", {"prompt": [[1, 2, 3], [4]], "max_tokens": 5, "n": 2}, 77)
    assert (counted.texts, counted.known, counted.max_tokens) == ([], 4, 20)
    assert tokens.read("/v1/embeddings", {"input": "abc"}, 77).max_tokens == 0


def test_no_name_of_a_limit_gets_round_what_is_charged() -> None:
    body: dict[str, Any] = {
        "messages": [{"content": "a"}],
        "max_tokens": 2,
        "max_completion_tokens": 900,
        "n_predict": 800,
    }
    assert tokens.read(CHAT, body, 77).max_tokens == 2
    assert {body[key] for key in ("max_tokens", "max_completion_tokens", "n_predict")} == {2}
    body = {"prompt": "a", "n_predict": 5, "n_cmpl": 3}
    assert tokens.read("/v1/completions", body, 77).max_tokens == 15 and body["max_tokens"] == 5


def test_the_pool_for_llama_cpp_is_as_large_as_the_cache_that_the_readme_starts() -> None:
    text = (EXAMPLE / "README.md").read_text()
    file = (EXAMPLE / "pools.llama_cpp.json").read_text()
    cost = LlmCostModel.from_config(json.loads(file)["pools"]["llm"]["cost_model"])
    full, tried = (int(tokens) for tokens in re.findall(r"llama-server .*-c (\d+)", text))
    ((old, new),) = re.findall(r"sed 's/(.*?)/(.*?)/' pools\.llama_cpp\.json", text)
    for content, cache in ((file, full), (file.replace(old, new), tried)):
        units = json.loads(content)["pools"]["llm"]["max_units"]
        assert cost.units(cache, 0) == units and cost.units(cache + 1, 0) == units + 1


@pytest.mark.slow
def test_without_pgpark_the_server_runs_out_of_memory_and_with_it_never(dsn: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(EXAMPLE / "experiment.py"), "--requests", "20", "--within", "0.3", "--speed", "160",
               "--workers", "1", "--dsn", dsn, "--json", str(figures)]  # fmt: skip
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    direct, by_count, parked = found["outcomes"]
    assert direct["crashes"] >= 1, (found, time.monotonic() - started)
    assert parked["crashes"] == by_count["crashes"] == parked["failed"] == parked["left_without"] == 0, found
    assert parked["answered"] + parked["fetched_later"] + parked["too_late"] == 20
    assert parked["fetched_later"] == 3  # of 3 who left
    if sys.platform == "linux":
        assert 128 < parked["peak_mib"] <= found["card_mib"]
