"""The public name of `rftjax.weights.lora`."""

import sys

from rftjax.weights import lora

sys.modules[__name__] = lora
