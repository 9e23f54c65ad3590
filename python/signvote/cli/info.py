"""`signvote info`: what this installation is made of, for a user and for a bug report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

import numpy
import torch
import torch.distributed as dist

import signvote
from signvote.cuda import BUILD_COMMAND, cuda_available, find_module
from signvote.implementation import default_implementation


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="show versions, implementations and threads")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        facts = collect()
    except ValueError as error:  # SIGNVOTE_IMPLEMENTATION names none
        print(f"signvote info: {error}", file=sys.stderr)
        return 1
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


def collect() -> dict[str, str]:
    return {
        "signvote": signvote.__version__,
        "implementations": ", ".join(signvote.implementations()) + " (best first)",
        "chosen": f"{default_implementation()} ({reason()})",
        **cuda_facts(),
        "torch": torch.__version__,
        "gloo": "available" if gloo_available() else "not in this torch: the hook cannot run",
        "numpy": numpy.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "CPUs": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }


def cuda_facts() -> dict[str, str]:
    try:
        module = find_module()
    except ImportError as error:
        return {"CUDA": f"built, but cannot be imported: {error}"}
    if module is None:
        return {"CUDA": f"not built; in a checkout, with nvcc in PATH: {BUILD_COMMAND}"}
    architectures = module.architectures.split()
    ptx = ", ".join(name for name in architectures if not name.endswith("-real"))
    built = ", ".join(name.removesuffix("-real") for name in architectures)
    driver = module.driver_version()
    return {
        "CUDA": f"built for {built}, PTX of {ptx or 'none'}, runtime {dotted(module.runtime_version())}",
        "CUDA driver": f"for CUDA {dotted(driver)}" if driver else "none",
        "CUDA devices": cuda_devices(module),
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA available": cuda_is_available(),
    }


def cuda_devices(module: Any) -> str:
    try:
        return ", ".join(f"{name} ({major}.{minor})" for name, major, minor in module.devices()) or "none"
    except RuntimeError as error:
        return f"none ({error})"


def cuda_is_available() -> str:
    try:
        return "yes" if cuda_available() else "no"
    except RuntimeError as error:
        return f"no ({error})"


def dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def reason() -> str:
    name = os.environ.get("SIGNVOTE_IMPLEMENTATION")
    return f"SIGNVOTE_IMPLEMENTATION={name}" if name else "the best; SIGNVOTE_IMPLEMENTATION is not set"


def gloo_available() -> bool:
    return dist.is_available() and dist.is_gloo_available()
