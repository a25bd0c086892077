"""Runs code that a model wrote: a process of its own without network, the user's files, variables or privileges.

    from rftjax import sandbox

    result = sandbox.run_python("print(input()[::-1])", stdin="abc")
    assert (result.reason, result.output) == ("exit", "cba\n")

`docs/sandbox.md` says what holds on which system. Where no boundary can be drawn, nothing runs: `run` raises UserError.
"""

from rftjax.sandbox.limits import Limits, Result
from rftjax.sandbox.running import require, run, run_python, support

__all__ = ["Limits", "Result", "require", "run", "run_python", "support"]
