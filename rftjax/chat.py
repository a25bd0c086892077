"""The public name of `rftjax.text.chat`; run as a program, a talk with a model in the terminal."""

import runpy
import sys

from rftjax.text import chat

if __name__ == "__main__":  # python -m rftjax.chat MODEL: the command line lies above this module
    sys.argv[1:1] = ["chat"]
    runpy.run_module("rftjax.cli", run_name="__main__")
else:
    sys.modules[__name__] = chat
