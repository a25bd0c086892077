"""Large allocations in huge pages: where a program starts again for them, and that it does so once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rftjax.devices import huge_pages

ON_REQUEST = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("environ", "setting", "accelerator", "helps"),
    [
        ({}, ON_REQUEST, False, True),
        ({"JAX_PLATFORMS": "cpu"}, ON_REQUEST, True, True),
        ({}, ON_REQUEST, True, False),  # a device computes
        ({"JAX_PLATFORMS": "cuda"}, ON_REQUEST, False, False),
        ({}, "[always] madvise never\n", False, False),  # they come without a request
        ({}, "always madvise [never]\n", False, False),
        ({}, "", False, False),  # no Linux
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, ON_REQUEST, False, False),  # the user chose
    ],
)
def test_only_a_cpu_that_may_have_huge_pages_asks_for_them(environ, setting, accelerator, helps):
    assert huge_pages.helps(environ, setting, accelerator=accelerator) == helps


@pytest.mark.skipif("[madvise]" not in huge_pages.kernel_setting(), reason="as the kernel is set")
def test_a_program_starts_again_once_with_its_arguments_in_the_same_process():
    code = (
        "import os, sys; from rftjax.devices import huge_pages; print('start', os.getpid());"
        "sys.stdout.flush(); huge_pages.start_again(); print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    )
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    run = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, "--flag=a b"],
        env=environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    printed = run.communicate(timeout=60)[0].splitlines()
    assert run.returncode == 0
    assert printed == [f"start {run.pid}"] * 2 + ["glibc.malloc.hugetlb=1 ['--flag=a b']"]
