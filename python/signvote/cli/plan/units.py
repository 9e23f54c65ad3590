"""What a person writes for a number of parameters, a rate and a time."""

from __future__ import annotations

import argparse
import re

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_RATES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_NUMBER = r"(\d+(?:_\d+)*\.?\d*(?:e[+-]?\d+)?)"


def count(text: str) -> int:
    """124M, 1.3B, 25_000_000."""
    match = re.fullmatch(_NUMBER + r"\s*([kmbgt]?)", text.strip().lower())
    number = float(match[1]) * _COUNTS[match[2]] if match else 0.0
    if not 1 <= number <= 1e13:
        raise argparse.ArgumentTypeError(f"expected 1 to 10T, such as 124M, 1.3B or 25_000_000, got {text!r}")
    return round(number)


def rate(text: str) -> float:
    """1gbit, 100mbit, 1Gb/s, in bits per second."""
    match = re.fullmatch(_NUMBER + r"\s*([kmg]?)(?:bit(?:/s)?|b/s|bps)", text.strip().lower())
    number = float(match[1]) * _RATES[match[2]] if match and "B" not in text else 0.0
    if not 1e3 <= number <= 1e14:
        raise argparse.ArgumentTypeError(
            f"expected bits per second, 1kbit to 100000gbit, such as 100mbit, 10gbit or 1Gb/s, got {text!r}"
        )
    return number


def seconds(text: str) -> float:
    """0.8, 0.8s, 200ms, 50us."""
    match = re.fullmatch(_NUMBER + r"\s*(s|ms|us|)", text.strip().lower())
    number = float(match[1]) * _TIMES[match[2]] if match else -1.0
    if not 0 <= number <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a time of 0 to 1e6 s, such as 0.8, 200ms or 50us, got {text!r}")
    return number


def show_rate(bits_per_second: float) -> str:
    for size, name in ((1e9, "Gb/s"), (1e6, "Mb/s")):
        if bits_per_second >= size:
            return f"{bits_per_second / size:.3g} {name}"
    return f"{bits_per_second / 1e3:.3g} kb/s"


def show_seconds(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f} s"
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
