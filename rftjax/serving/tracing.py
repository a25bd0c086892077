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
from rftjax.serving.requests import BadRequest, ChatRequest, Request
from rftjax.serving.turns import Recording

# Codes of google.rpc.Code, and those that the protocol adds.
OK, FINISHED, RUNNING, SCORE_INVALID = 0, 100, 101, 102
PARTS = ("rollout_id", "invocation_id", "experiment_id", "run_id", "row_id")
_ALSO = ("project_id", "encoded_base_url")
MAX_ROLLOUTS, MAX_ENTRIES = 4096, 1000
MAX_LISTED = 1000

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

    A run's rollouts are those that it puts into `recordings`, and `closed` to others. A server that is not `closed`
    serves any address and keeps the traces alone, of the last `MAX_ROLLOUTS` rollouts.
    """

    def __init__(self, *, closed: bool = False, on_status: OnStatus | None = None) -> None:
        self.recordings: dict[str, Recording] = {}
        self._closed, self._on_status = closed, on_status
        self._rollouts: collections.OrderedDict[str, _Rollout] = collections.OrderedDict()

    def recording(self, params: Mapping[str, Any]) -> Recording | None:
        """Returns the recording of an address, None where any address is served; BadRequest where it is none."""
        key = _tags(params)["rollout_id"]
        found = self.recordings.get(key)
        if found is None and self._closed:
            raise BadRequest(
                f"rollout {key!r}: there is none, or it is over", status=410, code="rollout_over"
            )
        return found

    def opens(self, request: HttpRequest, given: Any) -> bool:
        """Whether a request names a rollout of the run, whose id nobody can guess."""
        return self._closed and _rollout_of(request, given) in self.recordings

    def forget(self, key: str) -> Recording | None:
        """Takes a rollout out and returns its recording."""
        self._rollouts.pop(key, None)
        return self.recordings.pop(key, None)

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
            if self._closed and key not in self.recordings:
                raise BadRequest(
                    f"rollout {key!r}: there is none, or it is over",
                    status=410,
                    code="rollout_over",
                )
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


def address(key: str, tags: Mapping[str, str]) -> str:
    """Returns the path of a rollout's address, as the managed service writes it."""
    found = {"rollout_id": key, **tags}
    return "".join(f"/{name}/{found[name]}" for name in PARTS)


def _tags(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of an address, `rollout_id` among them; raises BadRequest for another path."""
    if "rollout" in params:
        return {"rollout_id": str(params["rollout"])}
    parts = str(params.get("trace", "")).removeprefix("v1/").split("/")
    tags = dict(zip(parts[::2], parts[1::2], strict=False))
    if len(parts) % 2 or "rollout_id" not in tags or not tags.keys() <= {*PARTS, *_ALSO}:
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
