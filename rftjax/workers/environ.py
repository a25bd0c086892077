"""Environment variables that worker processes get: none that may hold a secret.

A variable is passed on if its name is on the list, or if its value cannot be a secret (a number, a plain word, an
existing path) and its name does not suggest one. A spec can name further ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from rftjax.errors import UserError

_ALLOWED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|SHELL|TERM|TZ|PWD|LANG|LANGUAGE|LC_\w+|TMPDIR|TEMP|TMP|XDG_\w+|"
    r"PYTHON\w*|VIRTUAL_ENV|CONDA_(PREFIX|DEFAULT_ENV)|LD_LIBRARY_PATH|DYLD_\w+|"
    r"SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|no_proxy|NO_PROXY|"
    r"HF_(HOME|HUB_OFFLINE|HUB_CACHE|DATASETS_OFFLINE|DATASETS_CACHE|ENDPOINT)|TRANSFORMERS_OFFLINE|"
    r"RFTJAX_CACHE|JAX_\w+|XLA_\w+|TOKENIZERS_PARALLELISM|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS)"
)
_PROXY = re.compile(r"(https?|all|ftp)_proxy", re.IGNORECASE)
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|PWD|PHRASE|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE|SIGNATURE|CERT|LICEN[CS]E|"
    r"DSN|(^|_)(PIN|OTP|PAT|SAS|JWT)($|_)",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"|[-+]?\d{0,6}(\.\d{0,6})?|(?=.{1,20}$)[A-Za-z][a-z]*([_-][a-z]+)*")


def worker_environment(
    names: Iterable[str], field: str, environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, str], list[str]]:
    """Returns the variables of a worker and the names of the withheld ones.

    `names` are passed on too; raises UserError for one that is not set. Accelerators are hidden (JAX runs on the CPU),
    because user code must not take their memory; naming JAX_PLATFORMS or CUDA_VISIBLE_DEVICES leaves these unchanged.
    """
    names = set(names)
    hidden = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    missing = sorted(name for name in names if name not in environment and name not in hidden)
    if missing:
        raise UserError(
            f"{field}: {', '.join(missing)} must be set where the run is started, and is not; "
            f"export it, or take it out of {field}"
        )
    passed = {
        name: value
        for name, value in environment.items()
        if name in names or _may_pass(name, value)
    }
    withheld = sorted(environment.keys() - passed.keys())
    # With more threads NumPy starts them at import, and a process with threads cannot be forked.
    passed = {"OPENBLAS_NUM_THREADS": "1"} | passed
    return passed | {name: value for name, value in hidden.items() if name not in names}, withheld


def _may_pass(name: str, value: str) -> bool:
    if _ALLOWED.fullmatch(name):
        return True
    if _PROXY.fullmatch(name):
        return "@" not in value
    if _SECRET.search(name):
        return False
    return bool(_HARMLESS.fullmatch(value)) or (os.path.isabs(value) and os.path.exists(value))
