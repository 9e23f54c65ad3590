"""What the ops refuse of CUDA tensors, and where they cannot work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import signvote
from bad_input import check_tensors_without_memory
from signvote import arguments, cuda, cuda_runs, ops

LION = (0.9, 0.1, 0.99, 0.01)

pytestmark = pytest.mark.timeout(600)  # compilers, on a machine that may be busy

UNTYPED_OPS: Any = ops


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: signvote.pack_signs(x.int()), TypeError, "pack_signs: x is torch.int32, expected float32"),
        (lambda x, w: signvote.pack_signs(x.view(10, 10).T), ValueError, "pack_signs: x is not contiguous"),
        (lambda x, w: signvote.pack_signs(x.to_sparse()), ValueError, "pack_signs: x has layout torch.sparse_coo"),
        (lambda x, w: signvote.pack_signs(torch._neg_view(x)), ValueError, "pack_signs: x has its negative bit set"),
        (lambda x, w: signvote.pack_signs(x, zeros="no"), ValueError, "pack_signs: zeros is 'no', expected 'coin'"),
        (
            lambda x, w: signvote.pack_signs(x, seed=-1),
            ValueError,
            "pack_signs: seed is -1, expected an integer from 0",
        ),
        (lambda x, w: signvote.pack_signs(x, out=w[:3]), ValueError, "pack_signs: out has 3 words, expected 4"),
        (
            lambda x, w: signvote.pack_signs(x, out=w.long()),
            TypeError,
            "pack_signs: out is torch.int64, expected int32",
        ),
        (
            lambda x, w: signvote.pack_signs(x, out=w.to("meta")),
            ValueError,
            "pack_signs: out is on device meta, expected ",
        ),
        (
            lambda x, w: UNTYPED_OPS.pack_signs(x, out=w.cpu().numpy()),
            TypeError,
            "pack_signs: out is a ndarray, expected a torch",
        ),
        (lambda x, w: signvote.pack_signs(x, out=x.view(torch.int32)[:4]), ValueError, "pack_signs: out overlaps x"),
        (
            lambda x, w: signvote.pack_signs(x, implementation="avx2"),
            ValueError,
            "pack_signs: implementation is 'avx2'",
        ),
        (
            lambda x, w: signvote.pack_signs(x, num_threads=2),
            ValueError,
            "pack_signs: num_threads is 2, expected None for a",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.clone(), coefficients=(1, 2, 3)),
            ValueError,
            "pack_momentum: coefficients is (1, 2, 3), expected four finite numbers",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.clone(), coefficients=(1, 2, 3, 1e39)),
            ValueError,
            "pack_momentum: coefficients is [1.0, 2.0, 3.0, 1e+39], expected four finite numbers",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x.double(), coefficients=LION),
            TypeError,
            "pack_momentum: momentum is float64, expected float32 for a float32 x",
        ),
        (
            lambda x, w: ops.pack_momentum(x, x[1:].clone(), coefficients=LION),
            ValueError,
            "pack_momentum: momentum has 99 coordinates, expected 100",
        ),
        (lambda x, w: ops.pack_momentum(x, x, coefficients=LION), ValueError, "pack_momentum: momentum overlaps x"),
        (lambda x, w: signvote.majority_vote([]), ValueError, "majority_vote: stack has 0 rows, expected 1 to 65535"),
        (lambda x, w: signvote.majority_vote(w), ValueError, "majority_vote: stack has 1 dimensions, expected 2"),
        (
            lambda x, w: UNTYPED_OPS.majority_vote([w, w[1:]]),
            ValueError,
            "majority_vote: stack[1] has 3 words, expected 4",
        ),
        (lambda x, w: signvote.majority_vote(w.view(2, 2).T), ValueError, "majority_vote: stack is not contiguous"),
        (
            lambda x, w: signvote.majority_vote(w[None], numel=129),
            ValueError,
            "majority_vote: stack has 4 words in a row, expected 5 for numel 129",
        ),
        (lambda x, w: signvote.majority_vote(w[None], out=w), ValueError, "majority_vote: out overlaps stack"),
        (lambda x, w: signvote.majority_vote([w.clone(), w], out=w), ValueError, "majority_vote: out overlaps stack"),
        (
            lambda x, w: signvote.unpack_signs(w, 129),
            ValueError,
            "unpack_signs: words has 4 words, expected 5 for numel",
        ),
        (
            lambda x, w: signvote.unpack_signs(w, 128, dtype="int8"),
            TypeError,
            "unpack_signs: dtype is 'int8', expected",
        ),
        (lambda x, w: signvote.unpack_signs(w, 128, scale=1e39), ValueError, "unpack_signs: scale is 1e+39, expected"),
        (lambda x, w: signvote.unpack_signs(w, 100, out=x[1:]), ValueError, "unpack_signs: out has 99 coordinates"),
        (lambda x, w: signvote.pack_ternary(x, threshold=-1), ValueError, "pack_ternary: threshold is -1.0, expected"),
        (lambda x, w: signvote.pack_ternary(x, out=w), ValueError, "pack_ternary: out has shape torch.Size([4])"),
        (
            lambda x, w: signvote.pack_ternary(x, out=w.view(2, 2)),
            ValueError,
            "pack_ternary: out has shape torch.Size([2, 2]), expected (2, 4)",
        ),
        (
            lambda x, w: signvote.pack_ternary(x, out=w.expand(2, 4)),
            ValueError,
            "pack_ternary: out overlaps itself, expected memory of its own",
        ),
        (
            lambda x, w: signvote.pack_ternary(x, out=x.view(torch.int32)[:8].view(2, 4)),
            ValueError,
            "pack_ternary: out overlaps x",
        ),
        (
            lambda x, w: signvote.pack_ternary(x, implementation="avx2"),
            ValueError,
            "pack_ternary: implementation is 'avx2'",
        ),
        (
            lambda x, w: signvote.majority_vote_ternary(w.view(2, 2)),
            ValueError,
            "majority_vote_ternary: stack has shape torch.Size([2, 2]), expected (M, 2, W)",
        ),
        (
            lambda x, w: signvote.majority_vote_ternary(w.view(1, 2, 2), quorum=0),
            ValueError,
            "majority_vote_ternary: quorum is 0, expected an integer from 1",
        ),
        (
            lambda x, w: signvote.majority_vote_ternary([w.view(2, 2), w.view(2, 2)], out=w.view(2, 2)),
            ValueError,
            "majority_vote_ternary: out overlaps stack",
        ),
        (
            lambda x, w: signvote.majority_vote_ternary(w.view(1, 2, 2), out=w.view(2, 2)),
            ValueError,
            "majority_vote_ternary: out overlaps stack",
        ),
        (
            lambda x, w: UNTYPED_OPS.majority_vote_ternary([w.view(2, 2), w[:2].view(2, 1)]),
            ValueError,
            "majority_vote_ternary: stack[1] has shape torch.Size([2, 1]), expected (2, 2)",
        ),
        (
            lambda x, w: UNTYPED_OPS.majority_vote_ternary([w.view(2, 2), w]),
            ValueError,
            "majority_vote_ternary: stack[1] has shape torch.Size([4]), expected (2, 2)",
        ),
        (
            lambda x, w: signvote.unpack_ternary(w.view(2, 2), 100),
            ValueError,
            "unpack_ternary: planes has shape (2, 2), expected (2, 4) for numel 100",
        ),
        (
            lambda x, w: signvote.unpack_ternary(w.view(2, 2), 64, out=x[1:]),
            ValueError,
            "unpack_ternary: out has 99 coordinates, expected 64",
        ),
    ],
)
def test_errors(
    device: torch.device, call: Callable[[torch.Tensor, torch.Tensor], Any], error: type[Exception], message: str
) -> None:
    x, w = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(error) as raised:
        call(x, w)
    assert str(raised.value).startswith(message)


def test_tensors_without_memory(device: torch.device) -> None:
    check_tensors_without_memory(device)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((-1, 0, 64, 0, 0), "DeviceRuns.of: runs has place -1 in row 0, expected 0 or more"),
        ((0, 32, 64, 0, 0), "DeviceRuns.of: runs has first 32 in row 0, expected a multiple of 64"),
        ((0, 0, -1, 0, 0), "DeviceRuns.of: runs has numel -1 in row 0, expected 0 or more"),
        (
            (0, 0, 64, 37, 0),
            "DeviceRuns.of: runs has coordinate 37 and numel 64 in row 0, expected a range within 100 c",
        ),
        ((0, 0, 64, 0, 3), "DeviceRuns.of: runs has word 3 and numel 64 in row 0, expected a range within 4 words"),
    ],
)
def test_runs_are_checked_as_on_the_cpu(device: torch.device, row: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        cuda_runs.DeviceRuns.of(np.array([row]), 100, 4, device)
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 100, 0, 0]]), 100, 4, device)
    words = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"^unpack_runs: runs has word 0 and numel 100 in row 0, expected a range"):
        cuda_runs.unpack_runs(words, runs, torch.ones(100, device=device))
    tensor = torch.zeros(2, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match=r"^vote_runs: counts is torch.int32, expected int64$"):
        cuda_runs.vote_runs(words.new_zeros(1, 4), runs, words.new_zeros(4), tensor, ties="coin", seed=0)
    with pytest.raises(ValueError, match=r"^vote_runs: counts has 2 counts, expected 1$"):
        cuda_runs.vote_runs(words.new_zeros(1, 4), runs, words.new_zeros(4), tensor.long(), ties="coin", seed=0)


def test_ternary_runs_are_checked_as_on_the_cpu(device: torch.device) -> None:
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 100, 0, 1]]), 100, 5, device)
    x, words = torch.ones(100, device=device), torch.zeros(10, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    calls: dict[str, Callable[[torch.Tensor, int], object]] = {
        "pack_ternary_runs": lambda w, stride: cuda_runs.pack_ternary_runs(x, runs, w, counts, stride=stride),
        "vote_ternary_runs": lambda w, stride: cuda_runs.vote_ternary_runs(
            w[None].clone(), runs, w, counts[:1], stride=stride
        ),
        "unpack_ternary_runs": lambda w, stride: cuda_runs.unpack_ternary_runs(w, runs, stride, x),
    }
    for name, call in calls.items():
        call(words[:9], 4)
        for size, stride, message in (
            (8, 4, "runs has word 1 and numel 100 in row 0, expected a range within 4 words"),
            (10, 3, "stride is 3, expected 4 or more, as row 0 of runs has so many words"),
            (10, 11, "stride is 11, expected at most 10"),
        ):
            with pytest.raises(ValueError, match=f"^{name}: {message}$"):
                call(words[:size], stride)


def test_ops_on_runs_take_cuda_tensors_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 100, 0, 0]]), 100, 4, device)
    x, words = torch.ones(100, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    pack: Any = functools.partial(cuda_runs.pack_runs, zeros="coin", seed=0)
    unpack: Any = cuda_runs.unpack_runs
    there = "expected a tensor on a CUDA device$"
    with pytest.raises(TypeError, match=r"^pack_runs: bucket is a ndarray, " + there):
        pack(np.ones(100, np.float32), None, LION, runs, words, counts)
    with pytest.raises(TypeError, match=r"^pack_runs: momentum is a NumPy array, " + there):
        pack(x, np.ones(100, np.float32), LION, runs, words, counts)
    with pytest.raises(TypeError, match=r"^pack_runs: out is a NumPy array, " + there):
        pack(x, None, LION, runs, np.zeros(4, np.uint32), counts)
    with pytest.raises(TypeError, match=r"^unpack_runs: bucket is a NumPy array, " + there):
        unpack(words, runs, np.ones(100, np.float32))
    module: Any = cuda.find_module()
    rows = words.new_zeros(1, 4)
    for name in ("majority_vote", "vote_runs"):
        second, pieces = (None, ()) if name == "majority_vote" else (runs.runs, (runs.vote_pieces,))
        with pytest.raises(TypeError, match=rf"^{name}: (stack|rows) is \[tensor.*expected an \(M, W\) tensor$"):
            getattr(module, name)([rows[0], rows[0]], second, "coin", 0, words, *pieces, None, 0, 0)
    with pytest.raises(TypeError, match=r"^pack_signs: x is torch.bfloat16, expected float16$"):
        module.pack_signs(x.bfloat16(), "float16", "coin", 0, words, None, 0, 0)
    with pytest.raises(TypeError, match=r"^vote_runs: runs is <class 'torch.Tensor'>, expected a NumPy array$"):
        module.vote_runs(rows, runs.pieces, "coin", 0, words, runs.vote_pieces, None, 0, 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    with pytest.raises(ValueError, match=r"^pack_runs: bucket is on device cpu, expected a CUDA device$"):
        pack(torch.ones(100), None, LION, runs, words, counts)
    with pytest.raises(ValueError, match=r"^pack_signs: x is on device cpu, " + there):
        module.pack_signs(torch.ones(100), "float32", "coin", 0, words, None, 0, 0)


def test_pieces_belong_to_the_runs(device: torch.device) -> None:
    runs, other = (
        cuda_runs.DeviceRuns.of(np.array([[0, 0, numel, 0, 0]]), 9000, 300, device) for numel in (9000, 2000)
    )
    x, words = torch.ones(9000, device=device), torch.zeros(300, dtype=torch.int32, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    module: Any = cuda.find_module()

    def pack(pieces: Any) -> None:
        module.pack_runs(x, "float32", None, LION, runs.runs, "coin", 0, words, pieces, counts, 0, 0)

    with pytest.raises(ValueError, match=r"^pack_runs: pieces has 2 rows, expected 9$"):
        pack(other.pieces)
    with pytest.raises(ValueError, match=r"^pack_runs: pieces has 3 rows, expected 9$"):
        pack(runs.vote_pieces)
    with pytest.raises(ValueError, match=r"^pack_runs: pieces has shape torch.Size\(\[45\]\), expected \(n, 5\)$"):
        pack(runs.pieces.view(-1))
    with pytest.raises(TypeError, match=r"^pack_runs: pieces is torch.float64, expected int64$"):
        pack(runs.pieces.double())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        pack(None)
    assert runs != cuda_runs.DeviceRuns(runs.runs, runs.pieces, runs.vote_pieces)


def test_counts_have_memory_of_their_own(device: torch.device) -> None:
    runs = cuda_runs.DeviceRuns.of(np.array([[0, 0, 64, 0, 0]]), 64, 8, device)
    x, words = torch.ones(64, device=device), torch.zeros(8, dtype=torch.int32, device=device)
    for counts, name in (
        (x.view(torch.int64)[:2], "another argument"),
        (words.view(torch.int64)[2:], "another argument"),
        (runs.pieces[0, :2], "the pieces of runs"),
    ):
        with pytest.raises(ValueError, match=f"^pack_runs: counts overlaps {name}, expected memory of its own$"):
            cuda_runs.pack_runs(x, None, LION, runs, words, counts, zeros="coin", seed=0)
    rows = torch.zeros(2, 8, dtype=torch.int32, device=device)
    tied = rows[1].view(torch.int64)[:1]
    with pytest.raises(ValueError, match=r"^vote_runs: counts overlaps the rows, expected memory of its own$"):
        cuda_runs.vote_runs(rows, runs, words, tied, ties="coin", seed=0)
    row = torch.zeros(4, dtype=torch.int32, device=device)
    for words_of_counts in (slice(0, 2), slice(2, 4)):
        tied = row[words_of_counts].view(torch.int64)
        with pytest.raises(ValueError, match=r"^vote_ternary_runs: counts overlaps another argument, expected memory "):
            cuda_runs.vote_ternary_runs(row[None].clone(), runs, row, tied, stride=2)
        with pytest.raises(ValueError, match=r"^vote_ternary_runs: counts overlaps the rows, expected memory of its "):
            cuda_runs.vote_ternary_runs(row[None], runs, row.clone(), tied, stride=2)
    for other in (torch.float64, torch.uint64, torch.complex64):
        with pytest.raises(TypeError, match=f"^vote_runs: counts is {other}, expected int64$"):
            cuda_runs.vote_runs(rows, runs, words, tied.clone().view(other), ties="coin", seed=0)


def test_device_that_the_kernels_were_not_built_for(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [stand_in.can_run(device) for device in (0, 1, 2)] == [True, False, False]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    message = (
        "pack_signs: CUDA: cudaErrorNoKernelImageForDevice: no kernel image is available: device 1 has compute "
        "capability 0.0, signvote was built for the architectures none"
    )
    with pytest.raises(RuntimeError) as raised:
        stand_in.pack_signs(torch.ones(9), "float32", "coin", 0, torch.zeros(1, dtype=torch.int32), None, 1, 0)
    assert str(raised.value) == message
    with pytest.raises(RuntimeError, match=r"^pack_signs: CUDA: cudaErrorInvalidDevice: invalid device ordinal$"):
        stand_in.pack_signs(torch.ones(9), "float32", "coin", 0, torch.zeros(1, dtype=torch.int32), None, 2, 0)


def test_available_if_the_kernels_run(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, device, expected in (("13.0", 0, True), ("13.0", 1, False), (None, 0, False)):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        assert signvote.cuda_available() is expected


# -- Without a device, nor a stand-in ----------------------------------------------------------------------------------


FAKE_MODE = FakeTensorMode()


def fake_tensor(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Without memory, on a device that need not be there."""
    with FAKE_MODE:
        return torch.empty(shape, dtype=dtype, device=device)


def test_without_the_cuda_part_the_error_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: None)
    assert signvote.cuda_available() is False
    x, momentum = (fake_tensor(64, dtype=torch.float32, device="cuda:0") for _ in range(2))
    words = fake_tensor(2, dtype=torch.int32, device="cuda:0")
    stack = fake_tensor(1, 2, dtype=torch.int32, device="cuda:0")
    calls: dict[str, Callable[[], object]] = {
        "pack_signs: x": lambda: signvote.pack_signs(x),
        "pack_momentum: x": lambda: ops.pack_momentum(x, momentum, coefficients=LION),
        "majority_vote: stack": lambda: signvote.majority_vote(stack),
        "majority_vote: stack[0]": lambda: signvote.majority_vote([words]),
        "unpack_signs: words": lambda: signvote.unpack_signs(words, 64),
        "pack_ternary: x": lambda: signvote.pack_ternary(x),
        "majority_vote_ternary: stack": lambda: signvote.majority_vote_ternary(stack),
        "unpack_ternary: planes": lambda: signvote.unpack_ternary(stack, 64),
        "has_nonfinite: x": lambda: signvote.has_nonfinite(x),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value).startswith(f"{name} is on device cuda:0, but signvote was built without its CUDA part")
        assert cuda.BUILD_COMMAND in str(raised.value)


def test_devices_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_module", lambda: object())
    monkeypatch.setattr(arguments, "_has_memory", lambda x: True)
    x = fake_tensor(64, dtype=torch.float32, device="cuda:0")
    words = fake_tensor(2, dtype=torch.int32, device="cuda:1")
    for out, device in ((words, "cuda:1"), (torch.zeros(2, dtype=torch.int32), "cpu")):
        with pytest.raises(ValueError, match=f"^pack_signs: out is on device {device}, expected cuda:0$"):
            signvote.pack_signs(x, out=out)
    with pytest.raises(ValueError, match=r"^pack_signs: out is on device cuda:1, expected cpu$"):
        signvote.pack_signs(torch.ones(100), out=words)
    with pytest.raises(ValueError, match=r"^majority_vote: stack\[1\] is on device cpu, expected cuda:1$"):
        signvote.majority_vote([words, torch.zeros(2, dtype=torch.int32)])
    tally: signvote.VoteTally[torch.Tensor] = signvote.VoteTally(64, 3)
    with pytest.raises(ValueError, match=r"^VoteTally.add: words is on device cuda:1, expected cpu$"):
        tally.add(words)
