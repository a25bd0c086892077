"""The public name of `rftjax.text.tokenizer`."""

import sys

from rftjax.text import tokenizer

sys.modules[__name__] = tokenizer
