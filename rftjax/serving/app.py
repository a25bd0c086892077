"""The HTTP side of a server: routes, tokens, limits and errors, in OpenAI's formats."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rftjax.serving.counts import Counts
from rftjax.serving.exchange import Exchange, Shape
from rftjax.serving.requests import BadRequest, ChatRequest, CompletionRequest, Request, parse
from rftjax.serving.service import Closed, Service
from rftjax.serving.tracing import Tracing
from rftjax.serving.turns import Model, Recording, Single
from rftjax.types import SamplingParams

log = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], Awaitable[Response]]
OVERLOADED_S = "1"  # after which a client that was turned away may ask again


class App:
    """Answers requests with one engine.

    `key` is the bearer token; `max_bytes` bounds a request's body, `max_waiting` the turns that wait for a slot.
    `tracing` has the rollouts whose addresses are served.
    """

    def __init__(
        self,
        service: Service,
        model: Model,
        params: SamplingParams,
        tracing: Tracing,
        *,
        key: str,
        max_bytes: int,
        max_waiting: int,
    ) -> None:
        self.service, self.model, self.tracing = service, model, tracing
        self.counts = Counts(service)
        self._single = Single(service, model, params)
        self._key, self._max_bytes, self._max_waiting = key, max_bytes, max_waiting
        self._created = int(time.time())

    def routes(self) -> Starlette:
        """Returns the ASGI application."""
        guarded = self._guarded
        trace = "{trace:path}"
        routes = [
            Route("/health", self._health),
            Route("/metrics", guarded(self._metrics)),
            Route("/v1/models", guarded(self._models)),
            Route("/v1/models/{name:path}", guarded(self._one_model)),
            Route("/v1/chat/completions", guarded(self._chat), methods=["POST"]),
            Route("/v1/completions", guarded(self._completions), methods=["POST"]),
            *(
                Route(f"{version}{path}", self._traced(handler), methods=[method])
                for version in ("", "/v1")
                for path, handler, method in (
                    ("/status", self.tracing.status, "GET"),
                    ("/logs", self.tracing.read_logs, "GET"),
                    ("/logs", self.tracing.take_log, "POST"),
                    ("/traces/pointwise", self.tracing.traces, "GET"),
                    ("/project_id/{project}/traces/pointwise", self.tracing.traces, "GET"),
                )
            ),
            Route("/rollouts/{rollout}/v1/models", guarded(self._models)),
            *(
                Route(f"{start}/{end}", guarded(handler), methods=["POST"])
                for start in ("/rollouts/{rollout}/v1", f"/{trace}")
                for end, handler in (
                    ("chat/completions", self._chat),
                    ("completions", self._completions),
                )
            ),
        ]
        handlers: Any = {
            BadRequest: self._bad_request,
            HTTPException: self._http_error,
            Closed: self._closed,
            ClientDisconnect: self._gone,
            Exception: self._fault,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: HttpRequest) -> Response:
            self._check_token(request)
            return await handler(request)

        return guarded

    def _traced(self, handler: Callable[[HttpRequest, Any], Awaitable[Response]]) -> Handler:
        """Returns a handler that an own rollout's unguessable name opens, as the token does."""

        async def traced(request: HttpRequest) -> Response:
            body = await self._body(request) if request.method == "POST" else b""
            given = None
            if body:
                try:
                    given = json.loads(body)
                except (ValueError, RecursionError):
                    raise BadRequest("the body is not valid JSON") from None
            if not self.tracing.opens(request, given):
                self._check_token(request)
            return await handler(request, given)

        return traced

    def _check_token(self, request: HttpRequest) -> None:
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if not self._key or (
            kind.lower() == "bearer" and hmac.compare_digest(token.encode(), self._key.encode())
        ):
            return
        what = "the bearer token is wrong" if token else "a bearer token is needed"
        raise BadRequest(
            f"{what}: send 'Authorization: Bearer KEY' with the key that the server was started with",
            status=401,
            code="invalid_api_key",
        )

    async def _body(self, request: HttpRequest) -> bytes:
        length = request.headers.get("content-length", "")
        parts, size = [], int(length) if length.isdigit() else 0
        if size <= self._max_bytes:
            size = 0
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    break
        if size > self._max_bytes:
            raise BadRequest(
                f"serving.max_request_bytes={self._max_bytes}: the body is larger; send less, or raise it",
                status=413,
            )
        return b"".join(parts)

    async def _health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(
            self.counts.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def _card(self) -> dict[str, Any]:
        card = {"id": self.model.name, "object": "model", "created": self._created}
        return card | {"owned_by": "rftjax", "max_model_len": self.model.max_length}

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            raise BadRequest(
                f"model={name!r}: there is no such model; there is {self.model.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, ChatRequest)

    async def _completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, CompletionRequest)

    async def _answer(self, request: HttpRequest, kind: type[Request]) -> Response:
        body = await self._body(request)
        asked: Request = parse(body, kind)
        desk: Single | Recording = self._single
        if request.path_params:
            # What an agent calls the model says nothing: its address does.
            desk = self.tracing.recording(request.path_params) or desk
        elif self.tracing.closed:
            raise BadRequest(
                "calls belong to a rollout: give the client the base_url that the agent got",
                status=403,
            )
        else:
            self._check_model(asked.model)
        waiting = self.service.active - self.service.engine.slots
        if desk is self._single and waiting >= self._max_waiting:
            raise BadRequest(
                f"serving.max_waiting={self._max_waiting}: as many requests wait already; ask again later",
                status=429,
                code="overloaded",
            )
        exchange = Exchange(desk, asked)
        shape = Shape(exchange, self.model.name, uuid.uuid4().hex, int(time.time()))
        if asked.stream:
            events = self._stream(request, exchange, shape)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            await _while_connected(request, _drained(exchange))
        finally:
            exchange.give_up()
            self.counts.answered(exchange)
        self.tracing.keep(request.path_params, asked, exchange)
        return JSONResponse(shape.whole())

    async def _stream(
        self, request: HttpRequest, exchange: Exchange, shape: Shape
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in shape.first():
                yield _event(chunk)
            async for event in exchange.events():
                for chunk in shape.piece(*event):
                    yield _event(chunk)
            for chunk in shape.last():
                yield _event(chunk)
            self.tracing.keep(request.path_params, exchange.asked, exchange)
            yield b"data: [DONE]\n\n"
        except Exception as error:
            yield _event(_problem(str(error), "server_error"))
        finally:
            exchange.give_up()
            self.counts.answered(exchange)

    async def _bad_request(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        self.counts.refused(error.status)
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": OVERLOADED_S}}
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        found = _problem(str(error), kind, error.param, error.code)
        return JSONResponse(found, error.status, headers.get(error.status))

    async def _http_error(self, request: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self.counts.refused(error.status_code)
        text = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(
            _problem(text, "invalid_request_error"), error.status_code, error.headers
        )

    async def _closed(self, request: HttpRequest, error: Exception) -> Response:
        self.counts.refused(410)
        return JSONResponse(_problem(f"{error}: the rollout or the server is over", "gone"), 410)

    async def _gone(self, request: HttpRequest, error: Exception) -> Response:
        self.counts.refused(499)
        return Response(status_code=499)

    async def _fault(self, request: HttpRequest, error: Exception) -> Response:
        self.counts.refused(500)
        return JSONResponse(_problem(f"{type(error).__name__}: {error}", "server_error"), 500)


async def _drained(exchange: Exchange) -> None:
    async for _ in exchange.events():
        pass


async def _while_connected(request: HttpRequest, work: Any) -> None:
    """Runs a coroutine until it is done; raises ClientDisconnect, and cancels it, where its client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _problem(text: str, kind: str, param: str = "", code: str = "") -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": param or None, "code": code or None}}
