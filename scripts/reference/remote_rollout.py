"""Runs Eval Protocol's own `RemoteRolloutProcessor`, unmodified, with `rftjax serve` as its tracing gateway.

    RFTJAX_API_KEY=KEY rftjax serve MODEL --config.serving.port=8700 &
    python -m venv ep && ep/bin/pip install eval-protocol openai
    export EP_MODEL_BASE_URL=http://localhost:8700 FW_TRACING_GATEWAY_BASE_URL=http://localhost:8700
    FIREWORKS_API_KEY=KEY LITELLM_LOCAL_MODEL_COST_MAP=True ep/bin/python scripts/reference/remote_rollout.py

An agent's server in this process gets `/init`, asks the model twice and logs its status with the package's own
handler. Prints the status and the roles of each rollout's trace, and fails where one is not as it must be. The address
must begin with http://localhost: the processor adds a rollout's tags to such ones only.

Done with eval-protocol 0.3.33: six rollouts finished with their traces, and the one whose prompt does not fit raised
InternalError with the gateway's reason.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import logging
import os
import threading
from typing import Any

from eval_protocol import FireworksTracingHttpHandler, InitRequest, RolloutIdFilter, Status
from eval_protocol.models import EvaluationRow, ExecutionMetadata, InputMetadata, Message
from eval_protocol.pytest.remote_rollout_processor import RemoteRolloutProcessor
from eval_protocol.pytest.types import RolloutProcessorConfig
from openai import OpenAI

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
COUNT = 6
TOO_LONG = "c " * 5000


def work(asked: InitRequest) -> None:
    """The agent: two turns, then its status as the package's handler logs it."""
    name = asked.metadata.rollout_id
    log = logging.getLogger(f"agent.{name}")
    log.addFilter(RolloutIdFilter(name))
    try:
        params = asked.completion_params | ({"tools": asked.tools} if asked.tools else {})
        messages: list[Any] = [one.model_dump(exclude_none=True) for one in asked.messages]
        with OpenAI(base_url=asked.model_base_url, api_key=asked.api_key) as client:
            answer = client.chat.completions.create(messages=messages, **params)
            messages += [answer.choices[0].message.to_dict(), {"role": "user", "content": "And?"}]
            client.chat.completions.create(messages=messages, **params)
        log.info("done", extra={"status": Status.rollout_finished()})
    except Exception as error:
        log.error("failed: %s", error, extra={"status": Status.rollout_internal_error(str(error))})


class Handler(http.server.BaseHTTPRequestHandler):
    """The agent's server."""

    def do_POST(self) -> None:
        """Takes /init."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        threading.Thread(target=work, args=(InitRequest(**json.loads(body)),)).start()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def row(index: int, text: str) -> EvaluationRow:
    """Returns a row of a dataset."""
    found = EvaluationRow(
        messages=[Message(role="user", content=text)],
        input_metadata=InputMetadata(row_id=f"row-{index}"),
        tools=TOOLS if index % 2 else None,
    )
    found.execution_metadata = ExecutionMetadata(
        invocation_id="i",
        experiment_id="e",
        rollout_id=f"rollout-{os.getpid()}-{index}",
        run_id="r",
    )
    return found


async def main(url: str) -> None:
    """Runs the rollouts and looks at what came back."""
    processor = RemoteRolloutProcessor(remote_base_url=url, poll_interval=0.1)
    config = RolloutProcessorConfig(
        completion_params={"model": "any", "temperature": 1.0, "max_tokens": 12},
        mcp_config_path="",
        semaphore=asyncio.Semaphore(8),
        steps=3,
    )
    rows = [row(index, f"What is {index} + 1?") for index in range(COUNT)] + [row(COUNT, TOO_LONG)]
    *good, long = await asyncio.gather(*processor(rows, config), return_exceptions=True)
    await processor.acleanup()
    for found in good:
        assert isinstance(found, EvaluationRow), found
        roles = [message.role for message in found.messages]
        print(found.rollout_status.code.name, roles)
        assert found.rollout_status.code == Status.Code.FINISHED
        assert roles == ["user", "assistant", "user", "assistant"]
    print(type(long).__name__, str(long)[:200])
    assert "rollout.max_length" in str(long)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(FireworksTracingHttpHandler())
    agent = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=agent.serve_forever, daemon=True).start()
    asyncio.run(main(f"http://127.0.0.1:{agent.server_port}"))
