"""The managed service's tracing gateway: rollouts by their address, their traces, logs and status.

The wire format is that of Eval Protocol's `RemoteRolloutProcessor` and `FireworksTracingAdapter`.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rftjax.serving.answers import with_text_arguments
from rftjax.serving.exchange import Exchange
from rftjax.serving.protocol import ALSO, PARTS
from rftjax.serving.requests import BadRequest, ChatRequest, Request
from rftjax.serving.turns import Recording

MAX_ROLLOUTS, MAX_ENTRIES = 4096, 1000
MAX_LISTED = 1000

Find = Callable[[str], Recording | None]
# Gets the rollout's id, a status code and its message.
OnStatus = Callable[[str, int, str], None]


@dataclasses.dataclass
class _Rollout:
    """What is kept of one rollout."""

    traces: collections.deque[dict[str, Any]]
    logs: collections.deque[dict[str, Any]]
    status: dict[str, Any] | None = None
    extras: dict[str, Any] | None = None


class Tracing:
    """Keeps what calls under an address said.

    A run's rollouts are those for which `find` has a recording; `on_status` gets their statuses. A server without
    `find` serves any address and keeps the traces alone, of the last `MAX_ROLLOUTS` rollouts.
    """

    def __init__(self, *, find: Find | None = None, on_status: OnStatus | None = None) -> None:
        self._find, self._on_status = find, on_status
        self._rollouts: collections.OrderedDict[str, _Rollout] = collections.OrderedDict()

    def recording(self, params: Mapping[str, Any]) -> Recording | None:
        """Returns the recording of an address, None where any address is served; BadRequest where it is none."""
        key = _tags(params)["rollout_id"]
        return self._own(key) if self._find else None

    @property
    def closed(self) -> bool:
        """Whether the rollouts of a run alone are served."""
        return self._find is not None

    def _own(self, key: str) -> Recording:
        found = self._find(key) if self._find else None
        if found is None:
            raise BadRequest(
                f"rollout {key!r}: there is none, or it is over", status=410, code="rollout_over"
            )
        return found

    def opens(self, request: HttpRequest, given: Any) -> bool:
        """Whether a request names a rollout of the run, whose id nobody can guess."""
        return self._find is not None and self._find(_rollout_of(request, given)) is not None

    def forget(self, key: str) -> None:
        """Drops what is kept of a rollout."""
        for name in [name for name in self._rollouts if name.partition(".")[0] == key]:
            del self._rollouts[name]

    def keep(self, params: Mapping[str, Any], asked: Request, exchange: Exchange) -> None:
        """Keeps the trace of an answered chat."""
        if not params or not isinstance(asked, ChatRequest):
            return
        tags = _tags(params)
        rollout = self._rollout(tags["rollout_id"])
        # As the client sent them: arguments of calls as text.
        messages = [with_text_arguments(message) for message in asked.messages]
        for turn in exchange.turns:
            asked_for = {"messages": messages} | ({"tools": asked.tools} if asked.tools else {})
            rollout.traces.append(
                {
                    "id": uuid.uuid4().hex,
                    "name": "chat.completions",
                    "timestamp": _now(),
                    "tags": [f"{name}:{value}" for name, value in tags.items()],
                    "input": asked_for,
                    "output": turn.answer.message,
                    "metadata": {},
                    "observations": [],
                }
            )

    async def status(self, request: HttpRequest, given: Any) -> Response:
        """GET /status: the last status that was logged, null where there is none yet."""
        key = _rollout_of(request, given)
        if not key:
            raise BadRequest(
                "rollout_id: must be given, as /status?rollout_id=ID", param="rollout_id"
            )
        found = self._rollouts.get(key)
        status, extras = (found.status, found.extras) if found else (None, None)
        return JSONResponse({"rollout_id": key, "status": status, "extras": extras})

    async def read_logs(self, request: HttpRequest, given: Any) -> Response:
        """GET /logs: the entries with all of the given tags, the newest first."""
        tags = request.query_params.getlist("tags")
        if not tags:
            raise BadRequest("tags: must be given, as /logs?tags=rollout_id:ID", param="tags")
        rollouts = self._with_tag(tags)
        entries = [
            one for rollout in rollouts for one in rollout.logs if set(tags) <= set(one["tags"])
        ]
        entries.sort(key=lambda one: one["timestamp"], reverse=True)
        entries = entries[: _limit(request)]
        return JSONResponse({"entries": entries, "total_entries": len(entries)})

    async def take_log(self, request: HttpRequest, given: Any) -> Response:
        """POST /logs: keeps an entry of a rollout, and the status that it may have."""
        entry = given if isinstance(given, dict) else {}
        tags = entry.get("tags")
        names = [str(tag) for tag in tags] if isinstance(tags, list) else []
        keys = [tag.partition(":")[2] for tag in names if tag.startswith("rollout_id:")]
        if not keys:
            raise BadRequest('tags: must hold "rollout_id:ID"', param="tags")
        status = _status(entry.get("status"))
        extras = entry.get("extras") if isinstance(entry.get("extras"), dict) else None
        kept = {
            "timestamp": _now(),
            "message": str(entry.get("message") or ""),
            "severity": str((extras or {}).get("level") or "INFO"),
            "program": entry.get("program"),
            "tags": names,
            "status": status,
            "extras": extras,
        }
        for key in keys:
            if self._find:
                self._own(key)
            rollout = self._rollout(key)
            rollout.logs.append(kept)
            if status is not None:
                rollout.status, rollout.extras = status, extras
                if self._on_status:
                    self._on_status(key, status["code"], status["message"])
        return JSONResponse({"status": "ok"})

    async def traces(self, request: HttpRequest, given: Any) -> Response:
        """GET /v1/traces/pointwise: the traces with all of the given tags, in their order."""
        tags = request.query_params.getlist("tags")
        if not tags:
            raise BadRequest("tags: must be given, as ?tags=rollout_id:ID", param="tags")
        found = [
            one
            for rollout in self._with_tag(tags)
            for one in rollout.traces
            if set(tags) <= set(one["tags"])
        ][: _limit(request)]
        return JSONResponse({"project_id": "rftjax", "total_traces": len(found), "traces": found})

    def _rollout(self, key: str) -> _Rollout:
        found = self._rollouts.setdefault(
            key,
            _Rollout(collections.deque(maxlen=MAX_ENTRIES), collections.deque(maxlen=MAX_ENTRIES)),
        )
        self._rollouts.move_to_end(key)
        while len(self._rollouts) > MAX_ROLLOUTS:
            self._rollouts.popitem(last=False)
        return found

    def _with_tag(self, tags: list[str]) -> list[_Rollout]:
        keys = [tag.partition(":")[2] for tag in tags if tag.startswith("rollout_id:")]
        if keys:
            return [self._rollouts[key] for key in keys[:1] if key in self._rollouts]
        return [*self._rollouts.values()]


def _tags(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of an address, `rollout_id` among them; raises BadRequest for another path."""
    if "rollout" in params:
        return {"rollout_id": str(params["rollout"])}
    parts = str(params.get("trace", "")).removeprefix("v1/").split("/")
    tags = dict(zip(parts[::2], parts[1::2], strict=False))
    if len(parts) % 2 or "rollout_id" not in tags or not tags.keys() <= {*PARTS, *ALSO}:
        raise BadRequest(f"/{'/'.join(parts)}: is no address of a rollout", status=404)
    return {name: value for name, value in tags.items() if name in PARTS}


def _rollout_of(request: HttpRequest, given: Any) -> str:
    tags = given.get("tags") if isinstance(given, dict) else None
    tags = tags if isinstance(tags, list) else request.query_params.getlist("tags")
    for tag in tags:
        name, _, value = str(tag).partition(":")
        if name == "rollout_id":
            return value
    return request.query_params.get("rollout_id", "")


def _status(given: Any) -> dict[str, Any] | None:
    code = given.get("code") if isinstance(given, dict) else None
    if isinstance(code, bool) or not isinstance(code, int):
        return None
    details = given.get("details")
    return {
        "code": code,
        "message": str(given.get("message") or ""),
        "details": details if isinstance(details, list) else [],
    }


def _limit(request: HttpRequest) -> int:
    text = request.query_params.get("limit", "100")
    return min(int(text), MAX_LISTED) if text.isdigit() else 100


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
