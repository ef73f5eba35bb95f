"""The interpreter's bfloat16 against PyTorch's, bit by bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the interpreter; a GPU compiles the kernel"),
    pytest.mark.launches("bf16_kernel"),
]


@triton.jit
def bf16_kernel(X, Y, MASK, SUM, ROUNDED, WIDE, PRODUCT, NUMBERS, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    keep = tl.load(MASK + at)
    x = tl.load(X + at, mask=keep != 0, other=1.5)
    y = tl.load(Y + at)
    tl.store(SUM + at, x * y + tl.full([SIZE, SIZE], 0.3, tl.bfloat16))
    tl.store(ROUNDED + at, (x.to(tl.float32) * 1.001).to(tl.bfloat16))
    tl.store(WIDE + at, x)
    tl.store(PRODUCT + at, tl.dot(x, tl.trans(y)))
    tl.store(NUMBERS + at, at.to(tl.bfloat16), mask=keep != 0)


def test_bfloat16_is_loaded_rounded_multiplied_and_stored_as_pytorch_does():
    size = 16
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, size, size, generator=generator).bfloat16()
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, 1e-40, -0.0])
    mask = torch.rand(size, size, generator=generator) > 0.3
    total, rounded, numbers = (torch.full((size, size), 7.0).bfloat16() for _ in range(3))
    wide, product = torch.empty(2, size, size)
    bf16_kernel[(1,)](x, y, mask.to(torch.uint8), total, rounded, wide, product, numbers, SIZE=size)
    x = x.where(mask, torch.tensor(1.5).bfloat16())
    assert torch.equal(total, x * y + torch.tensor(0.3).bfloat16())
    assert torch.equal(rounded, (x.float() * 1.001).bfloat16())
    assert torch.equal(wide, x.float())
    places = torch.arange(size * size).reshape(size, size).bfloat16()
    assert torch.equal(numbers, places.where(mask, torch.tensor(7.0).bfloat16()))
    finite = x[1:].double() @ y.double().T
    torch.testing.assert_close(product[1:].double(), finite, rtol=1e-6, atol=1e-6)
