"""The public name of `rftjax.text.chat`."""

import sys

from rftjax.text import chat

sys.modules[__name__] = chat
