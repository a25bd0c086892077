"""What a server did, as text for Prometheus."""

from __future__ import annotations

import collections
import time

from rftjax.serving.exchange import Exchange
from rftjax.serving.service import Service

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _Histogram:
    def __init__(self) -> None:
        self.counts, self.sum_s = [0] * len(BUCKETS_S), 0.0
        self.count = 0

    def add(self, value_s: float) -> None:
        self.count += 1
        self.sum_s += value_s
        for index, most_s in enumerate(BUCKETS_S):
            self.counts[index] += value_s <= most_s

    def lines(self, name: str) -> list[str]:
        buckets = [*zip(map(str, BUCKETS_S), self.counts, strict=True), ("+Inf", self.count)]
        lines = [f'{name}_bucket{{le="{most}"}} {count}' for most, count in buckets]
        return [*lines, f"{name}_sum {self.sum_s:.6f}", f"{name}_count {self.count}"]


class Counts:
    """Counts requests, tokens and times; the engine's own counters are read when they are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._requests: collections.Counter[str] = collections.Counter()
        self._prompt_tokens = self._completion_tokens = 0
        self._first, self._whole = _Histogram(), _Histogram()

    def answered(self, exchange: Exchange) -> None:
        """Counts a request that was taken, whether its client stayed or not."""
        self._requests["200"] += 1
        self._prompt_tokens += exchange.prompt_tokens
        self._completion_tokens += exchange.completion_tokens
        now_s = time.monotonic()
        if exchange.first_s:
            self._first.add(exchange.first_s - exchange.began_s)
        self._whole.add(now_s - exchange.began_s)

    def refused(self, status: int) -> None:
        """Counts a request that was not."""
        self._requests[str(status)] += 1

    def text(self) -> str:
        """Returns all counts in Prometheus' text format."""
        service = self._service
        slots, active = service.engine.slots, service.active
        counters = service.engine.counters
        lines: list[str] = []

        def say(name: str, kind: str, about: str, values: list[str]) -> None:
            lines.extend([f"# HELP rftjax_{name} {about}", f"# TYPE rftjax_{name} {kind}", *values])

        requests = [
            f'rftjax_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self._requests.items())
        ]
        say("requests_total", "counter", "Requests by status.", requests)
        for name, kind, about, value in (
            ("running", "gauge", "Turns that are being sampled.", min(active, slots)),
            ("waiting", "gauge", "Turns that wait for a slot.", max(0, active - slots)),
            ("slots", "gauge", "Rows that decode at once.", slots),
            ("conversations", "gauge", "Open conversations.", service.conversations),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self._prompt_tokens),
            ("completion_tokens_total", "counter", "Tokens of answers.", self._completion_tokens),
            (
                "prefilled_tokens_total",
                "counter",
                "Tokens that no row held yet.",
                counters.prefilled_tokens,
            ),
            ("decode_steps_total", "counter", "Decode steps.", counters.decode_steps),
            ("dispatches_total", "counter", "Calls of the device.", counters.dispatches),
        ):
            say(name, kind, about, [f"rftjax_{name} {value}"])
        name = "time_to_first_token_seconds"
        say(name, "histogram", "Until a first token.", self._first.lines(f"rftjax_{name}"))
        name = "request_seconds"
        say(name, "histogram", "Until the last token.", self._whole.lines(f"rftjax_{name}"))
        return "\n".join(lines) + "\n"
