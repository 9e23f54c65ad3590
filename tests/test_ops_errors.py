"""Bad input raises the documented error, in the documented words, and nothing is written."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import signvote
from bad_input import (
    COORDINATES,
    HALF,
    NW,
    NX,
    SENTINEL,
    W,
    X,
    check,
    check_tensors_without_memory,
    described,
    misaligned,
    numpy_words,
    read_only,
    row,
    words,
)
from signvote import _core, ops, runs


@pytest.mark.parametrize(("x", "error", "message"), COORDINATES)
def test_coordinates(x: Any, error: type[Exception], message: str) -> None:
    out = words() if isinstance(x, torch.Tensor) else numpy_words()
    check(lambda out: signvote.pack_signs(x, out=out), out, error, f"pack_signs: {message}")
    with pytest.raises(error, match="^has_nonfinite: " + re.escape(message)):
        signvote.has_nonfinite(x)
    momentum = torch.zeros(100) if isinstance(x, torch.Tensor) else np.zeros(100, np.float32)
    check(
        lambda out: ops.pack_momentum(x, momentum, coefficients=HALF, out=out),
        out,
        error,
        f"pack_momentum: {message}",
    )
    assert not momentum.any()


def test_tensors_without_memory() -> None:
    check_tensors_without_memory(torch.device("cpu"))


@pytest.mark.parametrize(
    ("out", "error", "message"),
    described(
        (words(3), ValueError, "out has 3 words, expected 4"),
        (words(5), ValueError, "out has 5 words, expected 4"),
        (words(4).reshape(2, 2), ValueError, "out has 2 dimensions, expected 1"),
        (words(8)[::2], ValueError, "out is not contiguous"),
        (words(4).long(), TypeError, "out is torch.int64, expected int32 words"),
        (words(4).float(), TypeError, "out is torch.float32, expected int32 words"),
        (words(4).to("meta"), ValueError, "out is on device meta, expected cpu"),
        (numpy_words(), TypeError, "out is a ndarray, expected a torch tensor like the other arguments"),
        ([0] * 4, TypeError, "out is a list, expected a torch tensor like the other arguments"),
    ),
)
def test_words_out(out: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^pack_signs: " + re.escape(message)):
        signvote.pack_signs(X, out=out)
    with pytest.raises(error, match="^majority_vote: " + re.escape(message)):
        signvote.majority_vote([W], out=out)
    with pytest.raises(error, match="^pack_momentum: " + re.escape(message)):
        ops.pack_momentum(X, X.clone(), coefficients=HALF, out=out)
    if isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert torch.all(out == torch.tensor(SENTINEL).to(out.dtype))


def test_numpy_words_out() -> None:
    check(
        lambda out: signvote.pack_signs(NX, out=read_only(out)),
        numpy_words(),
        ValueError,
        "pack_signs: out is read-only, expected a writable array",
    )
    check(
        lambda out: signvote.majority_vote(NW[None], out=read_only(out)),
        numpy_words(),
        ValueError,
        "majority_vote: out is read-only, expected a writable array",
    )
    check(
        lambda out: signvote.pack_signs(NX, out=out),
        numpy_words().astype(np.uint64),
        TypeError,
        "pack_signs: out is dtype('uint64'), expected uint32 (NumPy) or int32 (torch) words",
    )
    check(
        lambda out: signvote.pack_signs(NX, out=out),
        numpy_words().astype(">u4"),
        TypeError,
        "pack_signs: out is dtype('>u4'), expected uint32",
    )
    check(
        lambda out: signvote.pack_signs(NX, out=out),
        misaligned(numpy_words()),
        ValueError,
        "pack_signs: out is not aligned, expected an address that is a multiple of 4",
    )
    check(
        lambda out: signvote.pack_signs(NX, out=torch.from_numpy(out.view(np.int32))),  # type: ignore[type-var]
        numpy_words(),
        TypeError,
        "pack_signs: out is a Tensor, expected a NumPy array like the other arguments",
    )


@pytest.mark.parametrize("begin", [1, 4, 50, 101, 103])
def test_overlap_of_words(begin: int) -> None:
    memory = torch.full((108,), SENTINEL, dtype=torch.int32)
    x, stack, out = memory[4:104].view(torch.float32), memory[4:104].view(25, 4), memory[begin : begin + 4]
    rest = "expected memory of its own"
    check(lambda out: signvote.pack_signs(x, out=out), out, ValueError, f"pack_signs: out overlaps x, {rest}")
    check(
        lambda out: signvote.majority_vote(stack, out=out),
        out,
        ValueError,
        f"majority_vote: out overlaps stack, {rest}",
    )
    # Side by side is not overlapping.
    for free in (memory[:4], memory[104:]):
        signvote.pack_signs(x, out=free)
        signvote.majority_vote(stack, out=free)


def pack_with_momentum(x: torch.Tensor, momentum: torch.Tensor, out: torch.Tensor) -> None:
    ops.pack_momentum(x, momentum, coefficients=HALF, out=out)


def test_overlap_with_coordinates() -> None:
    memory = torch.full((104,), SENTINEL, dtype=torch.int32)
    check(
        lambda out: signvote.unpack_signs(memory[:4], 100, out=out),
        memory[3:103].view(torch.float32),
        ValueError,
        "unpack_signs: out overlaps words, expected memory of its own",
    )
    both = torch.ones(200)
    for x in (both[:100], both[50:150]):
        check(
            partial(pack_with_momentum, x, both[:100]),
            words(),
            ValueError,
            "pack_momentum: momentum overlaps x, expected memory of its own",
        )
    check(
        lambda out: ops.pack_momentum(both[100:], both[:100], coefficients=HALF, out=out),
        both[96:100].view(torch.int32),
        ValueError,
        "pack_momentum: out overlaps momentum, expected memory of its own",
    )


@pytest.mark.parametrize(
    ("momentum", "error", "message"),
    described(
        (torch.zeros(99), ValueError, "momentum has 99 coordinates, expected 100"),
        (torch.zeros(100).double(), TypeError, "momentum is float64, expected float32 for a float32 x"),
        (torch.zeros(100).bfloat16(), TypeError, "momentum is bfloat16, expected float32 for a float32 x"),
        (torch.zeros(200)[::2], ValueError, "momentum is not contiguous"),
        (torch.zeros(100, requires_grad=True), ValueError, "momentum requires gradients, expected a tensor outside"),
        (
            np.zeros(100, np.float32),
            TypeError,
            "momentum is a ndarray, expected a torch tensor like the other arguments",
        ),
        (torch.zeros(100, device="meta"), ValueError, "momentum is on device meta, expected cpu"),
    ),
)
def test_momentum(momentum: Any, error: type[Exception], message: str) -> None:
    check(
        lambda out: ops.pack_momentum(X, momentum, coefficients=HALF, out=out),
        words(),
        error,
        f"pack_momentum: {message}",
    )
    if momentum.device == torch.device("cpu") if isinstance(momentum, torch.Tensor) else True:
        assert not momentum.any()


def test_read_only_momentum() -> None:
    check(
        lambda out: ops.pack_momentum(NX, read_only(np.zeros(100, np.float32)), coefficients=HALF, out=out),
        numpy_words(),
        ValueError,
        "pack_momentum: momentum is read-only, expected a writable array",
    )


@pytest.mark.parametrize(
    "coefficients",
    [(), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, "x"), (1, 2, 3, float("nan")), (1, 2, 3, 1e39), None, 3.0],
)
def test_coefficients(coefficients: Any) -> None:
    momentum = torch.zeros(100)
    check(
        lambda out: ops.pack_momentum(X, momentum, coefficients=coefficients, out=out),
        words(),
        ValueError,
        "pack_momentum: coefficients is ",
    )
    assert not momentum.any()


@pytest.mark.parametrize(
    ("stack", "error", "message"),
    described(
        ([], ValueError, "stack has 0 rows, expected 1 to 65535"),
        (torch.empty(0, 4, dtype=torch.int32), ValueError, "stack has 0 rows, expected 1 to 65535"),
        (
            torch.zeros(1, 4, dtype=torch.int32).expand(65536, 4),
            ValueError,
            "stack has 65536 rows, expected 1 to 65535",
        ),
        ([W] * 65536, ValueError, "stack has 65536 rows, expected 1 to 65535"),
        (W, ValueError, "stack has 1 dimensions, expected 2"),
        (W.reshape(1, 2, 2), ValueError, "stack has 3 dimensions, expected 2"),
        (torch.tensor(3, dtype=torch.int32), ValueError, "stack has 0 dimensions, expected 2"),
        ([W, W[:3]], ValueError, "stack[1] has 3 words, expected 4"),
        ([W, W.reshape(2, 2)], ValueError, "stack[1] has 2 dimensions, expected 1"),
        ([W, torch.zeros(8, dtype=torch.int32)[::2]], ValueError, "stack[1] is not contiguous"),
        ([W, NW], TypeError, "stack[1] is a ndarray, expected a torch tensor like the other arguments"),
        ([W, None], TypeError, "stack[1] is a NoneType, expected a torch tensor like the other arguments"),
        ([W, W.long()], TypeError, "stack[1] is torch.int64, expected int32 words"),
        ([NW, NW.astype(np.uint64)], TypeError, "stack[1] is dtype('uint64'), expected uint32"),
        (torch.stack([W, W]).T, ValueError, "stack is not contiguous, expected rows of contiguous words"),
        (torch.stack([W, W]).long(), TypeError, "stack is torch.int64, expected int32 words"),
        (torch.stack([W, W]).float(), TypeError, "stack is torch.float32, expected int32 words"),
        (torch.stack([W, W]).to("meta"), ValueError, "stack is on device meta, expected cpu"),
        (torch.stack([W, W]).to_sparse(), ValueError, "stack has layout torch.sparse_coo, expected a dense tensor"),
        (NW[None].astype(np.float32), TypeError, "stack is dtype('float32'), expected uint32"),
        (misaligned(NW)[None], ValueError, "stack is not aligned, expected addresses that are multiples of 4"),
        (3, TypeError, "stack is a int, expected a NumPy array or a torch tensor"),
    ),
)
def test_stack(stack: Any, error: type[Exception], message: str) -> None:
    first = stack[0] if isinstance(stack, list) and stack else stack
    out = numpy_words() if isinstance(first, np.ndarray) else words()
    check(lambda out: signvote.majority_vote(stack, out=out), out, error, f"majority_vote: {message}")


@pytest.mark.parametrize(
    ("numel", "error", "message"),
    described(
        (-1, ValueError, "numel is -1, expected an integer from 0 to 2**63 - 1"),
        (2**63, ValueError, "numel is 9223372036854775808, expected an integer from 0 to 2**63 - 1"),
        (1.0, TypeError, "numel is 1.0, expected an integer"),
        ("100", TypeError, "numel is '100', expected an integer"),
    ),
)
def test_numel(numel: Any, error: type[Exception], message: str) -> None:
    check(
        lambda out: signvote.majority_vote(W[None], numel=numel, out=out), words(), error, f"majority_vote: {message}"
    )
    check(lambda out: signvote.unpack_signs(W, numel, out=out), torch.ones(100), error, f"unpack_signs: {message}")
    with pytest.raises(error, match="^num_words: " + re.escape(message)):
        signvote.num_words(numel)


@pytest.mark.parametrize("numel", [0, 96, 129, 2**62])
def test_numel_that_the_words_do_not_hold(numel: int) -> None:
    expected = (numel + 31) // 32
    check(
        lambda out: signvote.majority_vote(W[None], numel=numel, out=out),
        words(),
        ValueError,
        f"majority_vote: stack has 4 words in a row, expected {expected} for numel {numel}",
    )
    with pytest.raises(ValueError, match=f"^unpack_signs: words has 4 words, expected {expected} for numel {numel}"):
        signvote.unpack_signs(W, numel)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "seed is -1, expected an integer from 0 to 2**64 - 1"),
        (2**64, ValueError, "seed is 18446744073709551616, expected an integer from 0 to 2**64 - 1"),
        (0.0, TypeError, "seed is 0.0, expected an integer"),
        (None, TypeError, "seed is None, expected an integer"),
    ],
)
def test_seed(seed: Any, error: type[Exception], message: str) -> None:
    check(lambda out: signvote.pack_signs(X, seed=seed, out=out), words(), error, f"pack_signs: {message}")
    check(lambda out: signvote.majority_vote([W], seed=seed, out=out), words(), error, f"majority_vote: {message}")
    check(
        lambda out: ops.pack_momentum(X, X.clone(), coefficients=HALF, seed=seed, out=out),
        words(),
        error,
        f"pack_momentum: {message}",
    )


@pytest.mark.parametrize(
    ("num_threads", "error", "message"),
    [
        (0, ValueError, "num_threads is 0, expected an integer from 1 to 2**63 - 1"),
        (-1, ValueError, "num_threads is -1, expected an integer from 1 to 2**63 - 1"),
        (2**63, ValueError, "num_threads is 9223372036854775808, expected an integer from 1 to 2**63 - 1"),
        (2.0, TypeError, "num_threads is 2.0, expected an integer"),
        ("2", TypeError, "num_threads is '2', expected an integer"),
    ],
)
def test_num_threads(num_threads: Any, error: type[Exception], message: str) -> None:
    n: dict[str, Any] = {"num_threads": num_threads}
    check(lambda out: signvote.pack_signs(X, out=out, **n), words(), error, f"pack_signs: {message}")
    check(lambda out: signvote.majority_vote([W], out=out, **n), words(), error, f"majority_vote: {message}")
    check(lambda out: signvote.unpack_signs(W, 100, out=out, **n), X.clone(), error, f"unpack_signs: {message}")
    check(lambda _: signvote.has_nonfinite(X, **n), words(), error, f"has_nonfinite: {message}")
    check(
        lambda out: ops.pack_momentum(X, X.clone(), coefficients=HALF, out=out, **n),
        words(),
        error,
        f"pack_momentum: {message}",
    )
    table = row()
    check(
        lambda out: runs.pack_runs(X, None, HALF, table, out, zeros="coin", seed=0, **n),
        words(),
        error,
        f"pack_runs: {message}",
    )
    check(
        lambda out: runs.vote_runs([W], table, out, ties="coin", seed=0, **n), words(), error, f"vote_runs: {message}"
    )
    check(lambda out: runs.unpack_runs(W, table, out, **n), X.clone(), error, f"unpack_runs: {message}")


@pytest.mark.parametrize("choice", ["zero", "", "Coin", 1, None])
def test_zeros_and_ties(choice: Any) -> None:
    rest = f" is {choice!r}, expected 'coin', 'positive' or 'negative'"
    check(lambda out: signvote.pack_signs(X, zeros=choice, out=out), words(), ValueError, f"pack_signs: zeros{rest}")
    check(
        lambda out: signvote.majority_vote([W], ties=choice, out=out), words(), ValueError, f"majority_vote: ties{rest}"
    )


@pytest.mark.parametrize("name", ["sse9", "AVX2", 1])
def test_implementation(name: Any) -> None:
    rest = f"implementation is {name!r}, expected one of '"
    check(lambda out: signvote.pack_signs(X, implementation=name, out=out), words(), ValueError, f"pack_signs: {rest}")
    check(
        lambda out: signvote.majority_vote([W], implementation=name, out=out),
        words(),
        ValueError,
        f"majority_vote: {rest}",
    )
    check(
        lambda out: signvote.unpack_signs(W, 100, implementation=name, out=out),
        torch.ones(100),
        ValueError,
        f"unpack_signs: {rest}",
    )
    with pytest.raises(ValueError, match="^has_nonfinite: " + re.escape(rest)):
        signvote.has_nonfinite(X, implementation=name)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float8", "dtype is 'float8', expected 'float32'"),
        ("float64", "x is dtype('float32'), expected float64"),
        ("bfloat16", "x is dtype('float32'), expected uint16 or int16, the bits of bfloat16"),
    ],
)
def test_native_module_converts_nothing(dtype: str, message: str) -> None:
    out = numpy_words()
    with pytest.raises(TypeError, match="^pack_signs: " + re.escape(message)):
        _core.pack_signs(NX, dtype, "coin", 0, out, "portable")
    with pytest.raises(TypeError):
        _core.pack_signs([1.0], "float64", "coin", 0, out, "portable")  # type: ignore[arg-type]
    assert (out == SENTINEL).all()
