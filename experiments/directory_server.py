"""The agent of the spec `agent` as a server of its own, by the managed service's protocol.

    python experiments/directory_server.py --port=8701 &
    rftjax --config=agent --workdir=runs/remote --config.agent=http://127.0.0.1:8701

It learns as the function in `directory_agent.py` does: the same draw and sample get the same answers.
"""

from __future__ import annotations

import argparse
import http.server
import json
import threading
import urllib.request
from typing import Any

from directory import reply, rows
from directory_agent import TURNS
from openai import OpenAI

from rftjax.types import Task

FINISHED, INTERNAL = 100, 13  # the protocol's own code, and one of google.rpc.Code
DIRECTORY = {row["id"]: row for split in ("train", "heldout") for row in rows(split)}


def work(asked: dict[str, Any]) -> None:
    """Asks the model until it answers, looks up what it wants to find, and reports how that ended."""
    try:
        row = DIRECTORY[asked["metadata"]["row_id"]]
        task = Task(row["id"], asked["messages"], {"directory": row["directory"]})
        messages = list(asked["messages"])
        with OpenAI(base_url=asked["model_base_url"], api_key=asked["api_key"]) as client:
            for _ in range(TURNS):
                answer = client.chat.completions.create(
                    messages=messages, **asked["completion_params"]
                )
                messages.append(answer.choices[0].message.to_dict())
                found = reply(task, messages)
                if found is None:
                    break
                messages += found
        report(asked, FINISHED, "")
    except Exception as error:
        report(asked, INTERNAL, str(error))


def report(asked: dict[str, Any], code: int, message: str) -> None:
    """Sends a rollout's status to the logs of the address that it came from."""
    gateway = asked["model_base_url"].partition("/rollout_id/")[0]
    said = {
        "status": {"code": code, "message": message, "details": []},
        "tags": [f"rollout_id:{asked['metadata']['rollout_id']}"],
        "message": message or "finished",
        "extras": {},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{gateway}/logs", json.dumps(said).encode(), headers)
    with urllib.request.urlopen(request, timeout=30):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    """Takes `POST /init` and works on it in a thread."""

    def do_POST(self) -> None:
        """Answers at once, as the protocol has it."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
        threading.Thread(target=work, args=(asked,), daemon=True).start()

    def log_message(self, *_: object) -> None:
        """Says nothing of single requests."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8701)
    address = "127.0.0.1", parser.parse_args().port
    http.server.ThreadingHTTPServer.request_queue_size = 512
    http.server.ThreadingHTTPServer(address, Handler).serve_forever()
