"""Names and codes of the managed service's protocol for remote agents."""

from __future__ import annotations

from collections.abc import Mapping

# Codes of google.rpc.Code, and those that the protocol adds.
OK, FINISHED, RUNNING, SCORE_INVALID = 0, 100, 101, 102
PARTS = ("rollout_id", "invocation_id", "experiment_id", "run_id", "row_id")
ALSO = ("project_id", "encoded_base_url")


def address(key: str, tags: Mapping[str, str]) -> str:
    """Returns the path of a rollout's address, as the managed service writes it."""
    found = {"rollout_id": key, **tags}
    return "".join(f"/{name}/{found[name]}" for name in PARTS)
