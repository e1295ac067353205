"""Inline PTX as the interpreter runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nsa_oracle.harness.interpreter import ptx


def test_ptx_converts_every_e4m3_pair_and_rounds_to_even() -> None:
    words = np.arange(256, dtype=np.uint32) * 0x01010101
    scales = np.full(256, 0.3, np.float32).view(np.uint32)
    body = """{ .reg .b16 b<2>; .reg .b32 p; .reg .b16 h<2>; .reg .f32 x<2>;
        mov.b32 {b0, b1}, $1; cvt.rn.f16x2.e4m3x2 p, b1; mov.b32 {h0, h1}, p;
        cvt.f32.f16 x0, h0; cvt.f32.f16 x1, h1; mul.rn.f32 x1, x1, $2; cvt.rn.bf16x2.f32 $0, x1, x0; }"""
    (got,) = ptx.run(body, [words, scales], outputs=1)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.stack([values, values * 0.3], dim=1).bfloat16()
    halves = torch.from_numpy(got.view(np.uint16).reshape(256, 2).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(halves.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(halves.isnan(), values.isnan()[:, None].expand(256, 2))


def test_ptx_that_is_not_known_is_reported() -> None:
    word = np.zeros(4, np.uint32)
    with pytest.raises(ptx.PtxError, match=r"does not implement lop3\.b32"):
        ptx.run("{ lop3.b32 $0, $1, $1, $1, 0; }", [word], outputs=1)
    with pytest.raises(ptx.PtxError, match=r"does not implement guarded mov\.u32"):
        ptx.run("{ @p mov.u32 $0, 1; }", [word], outputs=1)
    with pytest.raises(ptx.PtxError, match="finds no value in x3"):
        ptx.run("{ mov.u32 $0, x3; }", [word], outputs=1)
    (got,) = ptx.run("{ @p prefetch.global.L2 [$1]; mov.u32 $0, 5; }", [word], outputs=1)
    assert got.tolist() == [5] * 4
