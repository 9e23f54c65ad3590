"""On which machine, and with what, the figures were measured."""

from __future__ import annotations

import mmap
import os
import platform
from pathlib import Path

import numpy
import torch

import signvote
from signvote.cli.info import dotted
from signvote.cuda import find_module


def versions() -> dict[str, str]:
    return {
        "signvote": signvote.__version__,
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cpus": usable_cpus(),
        "caches": caches(),
        "memory_gigabytes": memory_gigabytes(),
        "pages": pages(),
        "platform": platform.platform(),
        "implementations": signvote.implementations(),
    }


def cuda_device(device: torch.device) -> dict[str, object]:
    """What is to be known of figures that were measured on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    module = find_module()
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gigabytes": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": f"for CUDA {dotted(module.driver_version())}",
        "runtime": f"CUDA {dotted(module.runtime_version())}",
        "torch": f"CUDA {torch.version.cuda}",
    }


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Programs that ran or wanted to, in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """The model's name, and the numbers that tell what it is where a virtual machine hides the name."""
    facts: dict[str, str] = {}
    for line in lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model", "stepping") if key in facts]
    if "hypervisor" in facts.get("flags", "").split():
        numbers.append("virtual")
    return f"{name} ({', '.join(numbers)})" if numbers else name


def caches() -> list[str]:
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    return [
        " ".join(["L" + part for part in lines(folder / "level")] + lines(folder / "type") + lines(folder / "size"))
        for folder in folders
    ]


def memory_gigabytes() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def pages() -> str:
    """Of torch's large tensors; their size changes what memory costs."""
    setting = " ".join(lines("/sys/kernel/mm/transparent_hugepage/enabled")).partition("[")[2].partition("]")[0]
    if setting == "always" or (setting == "madvise" and os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"):
        return "huge pages"
    return f"{mmap.PAGESIZE // 1024} KB pages"


def lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
