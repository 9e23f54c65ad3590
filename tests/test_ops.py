"""The public ops: what goes in, what comes out, on NumPy arrays and on tensors."""

from __future__ import annotations

import ast
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import reference
import signvote
from signvote import _core, ops
from signvote.implementation import default_implementation

SIGNUM = (0.9, 1 - 0.9, 0.9, 1 - 0.9)
TORCH_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMPY_DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() < 0.2, torch.zeros(()), x)


def as_uint32(words: torch.Tensor) -> Any:
    assert words.dtype == torch.int32
    return words.numpy().view(np.uint32)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_in_numpy_out(dtype: Any) -> None:
    x = noise(10, 10).numpy().astype(dtype)
    words = signvote.pack_signs(x, seed=5)
    assert isinstance(words, np.ndarray)
    assert words.dtype == np.uint32
    assert np.array_equal(words, reference.pack_signs(x.astype(np.float64), seed=5)[0])
    assert signvote.has_nonfinite(x) is False

    votes = signvote.majority_vote(np.stack([words, ~words]), numel=100, seed=6)
    assert isinstance(votes, np.ndarray)
    assert votes.dtype == np.uint32
    assert np.array_equal(votes, reference.words_of(reference.coins(6, 100)))

    y = signvote.unpack_signs(votes, 100, dtype=dtype, scale=0.1)
    assert isinstance(y, np.ndarray)
    assert y.dtype == dtype
    assert np.array_equal(y, np.where(reference.coins(6, 100), 1, -1) * np.array(0.1).astype(dtype))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_in_torch_out(dtype: torch.dtype) -> None:
    x = noise(10, 10).to(dtype)
    words = signvote.pack_signs(x, seed=5)
    assert np.array_equal(as_uint32(words), reference.pack_signs(x.double().numpy(), seed=5)[0])
    assert signvote.has_nonfinite(x) is False

    votes = signvote.majority_vote(torch.stack([words, ~words]), numel=100, seed=6)
    assert np.array_equal(as_uint32(votes), reference.words_of(reference.coins(6, 100)))

    y = signvote.unpack_signs(votes, 100, dtype=dtype, scale=0.1)
    assert y.dtype == dtype
    expected = torch.from_numpy(np.where(reference.coins(6, 100), 1.0, -1.0)).to(dtype) * torch.tensor(0.1, dtype=dtype)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_pack_momentum(dtype: torch.dtype) -> None:
    x, momentum = noise(500).to(dtype), noise(500, seed=1)
    if dtype == torch.float64:
        momentum = momentum.double()
    expected, kept, *_ = reference.pack_momentum(x.to(momentum.dtype).numpy(), momentum.numpy(), SIGNUM, seed=3)
    out = torch.empty(16, dtype=torch.int32)
    words = ops.pack_momentum(x, momentum, coefficients=SIGNUM, seed=3, out=out)
    assert words is out
    assert np.array_equal(as_uint32(words), expected)
    assert np.array_equal(momentum.numpy(), kept)


def test_pack_momentum_of_numpy() -> None:
    x, momentum = noise(500).numpy(), noise(500, seed=1).numpy()
    expected, kept, *_ = reference.pack_momentum(x, momentum, (0.9, 0.1, 0.99, 0.01))
    words = ops.pack_momentum(x, momentum, coefficients=np.array([0.9, 0.1, 0.99, 0.01]))
    assert np.array_equal(words, expected)
    assert np.array_equal(momentum, kept)


def test_defaults() -> None:
    x = noise(100)
    words = signvote.pack_signs(x)
    assert np.array_equal(as_uint32(words), reference.pack_signs(x.numpy(), "coin", 0)[0])
    assert signvote.unpack_signs(words, 100).dtype == torch.float32
    assert signvote.unpack_signs(words.numpy(), 100).dtype == np.float32
    assert torch.equal(signvote.unpack_signs(words, 100).abs(), torch.ones(100))
    # numel unknown: all the bits are votes.
    votes = signvote.majority_vote(torch.stack([words, ~words]))
    assert np.array_equal(as_uint32(votes), reference.words_of(reference.coins(0, 128)))


def test_out_is_returned() -> None:
    x = noise(100)
    words = torch.empty(4, dtype=torch.int32)
    assert signvote.pack_signs(x, out=words) is words
    assert torch.equal(words, signvote.pack_signs(x))
    votes = torch.empty(4, dtype=torch.int32)
    assert signvote.majority_vote(words[None], out=votes) is votes
    assert torch.equal(votes, words)
    # Coordinates may be written to any shape, and dtype follows from out.
    y = torch.empty(10, 10, dtype=torch.bfloat16)
    assert signvote.unpack_signs(votes, 100, out=y) is y
    assert torch.equal(y.reshape(-1), signvote.unpack_signs(votes, 100, dtype="bfloat16"))
    z = np.empty((4, 25), np.float16)
    assert signvote.unpack_signs(votes.numpy(), 100, dtype="float16", out=z) is z


def test_stack_may_be_a_list() -> None:
    rows = [signvote.pack_signs(noise(100, seed=i)) for i in range(5)]
    votes = signvote.majority_vote(torch.stack(rows))
    assert torch.equal(signvote.majority_vote(rows), votes)
    assert torch.equal(signvote.majority_vote(tuple(rows)), votes)
    wide = torch.zeros(5, 9, dtype=torch.int32)
    wide[:, 3:7] = torch.stack(rows)
    assert torch.equal(signvote.majority_vote(wide[:, 3:7]), votes)
    assert np.array_equal(signvote.majority_vote([row.numpy() for row in rows]), votes.numpy())


def test_int32_words_of_numpy() -> None:
    words = signvote.pack_signs(noise(100))
    assert np.array_equal(
        signvote.unpack_signs(words.numpy(), 100), signvote.unpack_signs(words.numpy().view(np.uint32), 100)
    )


def test_read_only_input() -> None:
    x = noise(100).numpy()
    x.flags.writeable = False
    words = signvote.pack_signs(x)
    words.flags.writeable = False
    assert signvote.unpack_signs(words, 100).shape == (100,)


def test_autograd_is_left_alone() -> None:
    x = noise(100).requires_grad_()
    words = signvote.pack_signs(x)
    assert not words.requires_grad
    assert torch.equal(words, signvote.pack_signs(x.detach()))
    assert not signvote.has_nonfinite(x)
    assert not signvote.has_nonfinite(torch.nn.Parameter(x.detach()))


def test_zero_dimensions_and_zero_size() -> None:
    assert signvote.pack_signs(torch.tensor(2.0)).tolist() == [1]
    assert signvote.pack_signs(np.array(-2.0), zeros="positive").tolist() == [0]
    for empty in (torch.empty(0), torch.empty(3, 0, 2)):
        words = signvote.pack_signs(empty)
        assert words.shape == (0,)
        assert signvote.majority_vote(words[None]).shape == (0,)
        assert signvote.unpack_signs(words, 0).shape == (0,)
        assert not signvote.has_nonfinite(empty)
        assert signvote.pack_signs(empty.numpy()).shape == (0,)


def test_num_words() -> None:
    assert [signvote.num_words(n) for n in (0, 1, 31, 32, 33, 2**40)] == [0, 1, 1, 1, 2, 2**35]
    assert signvote.num_words(np.int64(100)) == 4


def test_seed() -> None:
    x = torch.zeros(1000)
    for seed in (0, 1, 2**63, 2**64 - 1, np.uint64(2**64 - 2), np.int32(5)):
        expected = reference.words_of(reference.coins(int(seed), 1000))
        assert np.array_equal(as_uint32(signvote.pack_signs(x, seed=seed)), expected)


@pytest.mark.parametrize("scale", [1.0, 0.1, -0.3, 3, 0.0, -0.0, 1e-45, 65504.0, 1 / 3, 1 + 2**-8, 1 + 3 * 2**-8])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_scale_is_rounded_as_torch_does(scale: float, dtype: torch.dtype) -> None:
    words = torch.tensor([0b01], dtype=torch.int32)
    y = signvote.unpack_signs(words, 2, dtype=dtype, scale=scale)
    expected = torch.stack([torch.tensor(scale, dtype=dtype), -torch.tensor(scale, dtype=dtype)])
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(y.view(bits), expected.view(bits))


def test_implementation_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = signvote.implementations()
    try:
        for name, expected in (("portable", "portable"), ("", names[0])):
            monkeypatch.setenv("SIGNVOTE_IMPLEMENTATION", name)
            default_implementation.cache_clear()
            assert default_implementation() == expected
            assert signvote.pack_signs(torch.ones(3)).tolist() == [0b111]
        monkeypatch.setenv("SIGNVOTE_IMPLEMENTATION", "sse9")
        default_implementation.cache_clear()
        with pytest.raises(ValueError, match=r"^SIGNVOTE_IMPLEMENTATION is 'sse9', expected one of '.*'portable'$"):
            signvote.pack_signs(torch.ones(3))
        assert signvote.pack_signs(torch.ones(3), implementation="portable").tolist() == [0b111]
    finally:
        default_implementation.cache_clear()


def test_threads_call_at_once(implementation: str) -> None:
    x = noise(50_000)
    rows = [signvote.pack_signs(noise(50_000, seed=i), implementation=implementation) for i in range(4)]

    def work(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        words = signvote.pack_signs(x, seed=seed, implementation=implementation)
        votes = signvote.majority_vote(rows, seed=seed, implementation=implementation)
        return words, votes, signvote.unpack_signs(votes, 50_000, implementation=implementation)

    expected = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for seed, results in enumerate(pool.map(work, [*range(8)] * 4)):
            for result, right in zip(results, expected[seed % 8], strict=True):
                assert torch.equal(result, right)


def test_stub_lists_what_the_native_module_has() -> None:
    stub = ast.parse((Path(ops.__file__).parent / "_core.pyi").read_text())
    stubs = {f.name: [a.arg for a in f.args.args] for f in stub.body if isinstance(f, ast.FunctionDef)}
    native = {}
    for name in dir(_core):
        if not name.startswith("_"):
            signature = str(getattr(_core, name).__doc__).splitlines()[0]
            native[name] = re.findall(r"(\w+): ", signature)
    assert stubs == native
