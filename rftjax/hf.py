"""The public name of `rftjax.weights.hf`."""

import sys

from rftjax.weights import hf

sys.modules[__name__] = hf
