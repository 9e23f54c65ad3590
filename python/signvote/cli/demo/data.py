"""The text of the demo: the Python standard library's own source files, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

# Tests, tables and generated text are most of the bytes of the standard library and little of its Python.
EXCLUDED = {"__pycache__", "dist-packages", "encodings", "pydoc_data", "site-packages", "test", "tests"}
HELD_OUT = 10  # one file in ten


class Corpus(NamedTuple):
    """Bytes to train on and bytes of other files to measure the loss on."""

    train: torch.Tensor
    held_out: torch.Tensor
    files: int


def source_files(root: Path) -> list[Path]:
    """The source files under `root` that the demo reads, in an order that is the same on every machine."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in found if EXCLUDED.isdisjoint(path.parts) and not path.stem.startswith("_sysconfigdata")]
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def load_corpus() -> Corpus:
    """Read the standard library; whole files are held out, so that no line of them was trained on."""
    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    held_out = files[HELD_OUT // 2 :: HELD_OUT]
    if not held_out:
        raise FileNotFoundError(f"the source files of the Python standard library are not in {root}")
    train = sorted(set(files) - set(held_out), key=lambda path: path.relative_to(root).as_posix())
    return Corpus(_read(train), _read(held_out), len(files))


def _read(paths: list[Path]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def sample(text: torch.Tensor, sequences: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """Random pieces of `text`, `context` bytes and the byte that follows: (sequences, context + 1)."""
    starts = torch.randint(len(text) - context, (sequences, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def every(text: torch.Tensor, sequences: int, context: int) -> torch.Tensor:
    """Pieces spread evenly over `text`: the same ones on every call."""
    starts = torch.linspace(0, len(text) - context - 1, sequences).long()
    return text[starts[:, None] + torch.arange(context + 1)].long()
