"""What is read from the text of Triton's first intermediate code."""

# ruff: noqa: E501 (lines as Triton prints them)

from __future__ import annotations

import pytest

from nsa_oracle.harness.compiled.ttir import Type, Unsupported, parse, split_types, type_of

MODULE = """
#loc = loc("/kernels/a.py":3:1)
#loc1 = loc(unknown)
#loc2 = loc("/kernels/a.py":7:5)
#loc3 = loc("/kernels/b.py":20:9)
#loc4 = loc("value"(#loc3))
#loc5 = loc(callsite(#loc4 at #loc2))
#loc6 = loc(callsite(#loc1 at #loc2))
module {
  tt.func public @kernel(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("x"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %range = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32> loc(#loc2)
    %p = tt.splat %x : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>> loc(#loc2)
    %q = tt.addptr %p, %range {tt.contiguity = dense<4> : tensor<1xi32>} : tensor<8x!tt.ptr<f32>>, tensor<8xi32> loc(#loc2)
    %r:2 = scf.for %i = %c0 to %n step %n iter_args(%a = %range, %b = %c0) -> (tensor<8xi32>, i32)  : i32 {
      %v = tt.load %q : tensor<8x!tt.ptr<f32>> loc(#loc5)
      scf.yield %a, %i : tensor<8xi32>, i32 loc(#loc6)
    } loc(#loc2)
    %s = "tt.reduce"(%r#0) <{axis = 0 : i32}> ({
    ^bb0(%v: i32 loc(callsite(#loc1 at #loc6)), %w: i32 loc(callsite(#loc1 at #loc6))):
      %u = arith.addi %v, %w : i32 loc(#loc2)
      tt.reduce.return %u : i32 loc(#loc2)
    }) : (tensor<8xi32>) -> i32 loc(#loc6)
    tt.return loc(#loc2)
  } loc(#loc)
} loc(#loc)
"""


def test_operations_values_and_lines() -> None:
    kernel = parse(MODULE)
    assert (kernel.name, kernel.promises) == ("kernel", ["tt.divisibility = 16 : i32", ""])
    assert [value.type for value in kernel.body.arguments] == [Type("!tt.ptr<f32>"), Type("i32")]
    found = {operation.name: operation for operation in kernel.operations()}
    assert found["tt.load"].result.type == Type("f32", (8,))
    assert found["tt.load"].where == "/kernels/b.py:20"  # in the function that is called
    assert found["scf.yield"].where == "/kernels/a.py:7"  # that of the call, where the function's is not known
    assert found["tt.addptr"].integers("tt.contiguity") == [4]
    assert [value.type for value in found["scf.for"].results] == [Type("i32", (8,)), Type("i32")]
    assert found["tt.reduce"].operands == [found["scf.for"].results[0]]
    assert found["arith.addi"].operands == found["tt.reduce"].regions[0].arguments  # not the load of the same name
    assert found["scf.for"].results[1].users == []
    assert found["tt.addptr"].result.users == [found["tt.load"]]


def test_types() -> None:
    assert type_of("tensor<4x1x!tt.ptr<bf16>>") == Type("!tt.ptr<bf16>", (4, 1))
    assert type_of("tensor<4x1x!tt.ptr<bf16>>").pointee == "bf16"
    assert split_types("tensor<4xi32>, !tt.ptr<f32, 1>, (i32, i32) -> i32") == [
        "tensor<4xi32>", " !tt.ptr<f32, 1>", " (i32, i32) -> i32",
    ]  # fmt: skip
    with pytest.raises(Unsupported, match="numbers of type f8E4M3B11FNUZ"):
        _ = Type("f8E4M3B11FNUZ").c


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("arith.addi %v, %w", "arith.addi %v, %unknown", "%unknown is used before it is defined"),
        ("tt.return loc", "cf.br ^bb1 loc", "tt.func"),
    ],
)
def test_what_is_not_understood_is_refused(old: str, new: str, reason: str) -> None:
    text = MODULE.replace(old, new)
    if reason == "tt.func":
        text, reason = text.replace("module {", "module {\n  tt.func private @f() {"), "not inlined"
    with pytest.raises(Unsupported, match=reason):
        parse(text)
