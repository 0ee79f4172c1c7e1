"""--inputs: what it makes, what stays symbolic, and what it says about a text that is wrong."""

from __future__ import annotations

import pytest
import torch

from nsa_compile.targets import Request, TargetError
from nsa_compile.targets.inputs import example_inputs
from tests.cli.running import MODELS, Runner, convert

__all__ = ["convert"]


def read(text: str, **sizes: int) -> tuple[list[object], dict[str, object]]:
    args, kwargs = example_inputs(Request("x", inputs=text, **sizes))

    def shown(x: torch.Tensor) -> tuple[object, ...]:
        return (str(x.dtype)[6:], *x.shape)

    return [shown(x) for x in args], {name: shown(x) for name, x in kwargs.items()}


def test_names_dtypes_and_shapes() -> None:
    assert read("int64[1,48]") == ([("int64", 1, 48)], {})
    assert read("x=bfloat16[2, 3,4] ; scale = float32[]") == (
        [],
        {"x": ("bfloat16", 2, 3, 4), "scale": ("float32",)},
    )
    assert read("bool[2], mask=bool[3]") == ([("bool", 2)], {"mask": ("bool", 3)})


def test_named_sizes() -> None:
    assert read("int64[B,T]") == ([("int64", 2, 8192)], {})
    assert read("int64[B,T],bool[T]", batch=3, seq_len=64)[0] == [("int64", 3, 64), ("bool", 64)]
    assert read("int64[N=5],int64[N]")[0] == [("int64", 5), ("int64", 5)]


def test_named_sizes_stay_symbolic_in_the_report(convert: Runner) -> None:
    outcome = convert(MODELS, "--inputs", "int64[B,T=48]", "--option", "dense_len=0")
    assert outcome.status == 0, outcome.err
    assert [type(outcome.site()[key]) for key in ("batch", "kv_len")] == [str, str]
    assert convert(MODELS, "--inputs", "ids=int64[1,40]").site()["kv_len"] == 40


BAD = {
    "": "expected name=dtype[size,...]",
    "x": "got 'x'",
    "x=int64": "got 'x=int64'",
    "x=int64[1": "expected name=dtype[size,...]",
    "x=int64[1] y=int64[1]": "expected name=dtype[size,...]",
    "x=int[1]": "expected a dtype of float64, float32",
    "x=int64[-1]": "expected sizes such as 4096, T or T=4096, got '-1'",
    "x=int64[0]": "expected a size from 1 up, got '0'",
    "x=int64[1.5]": "got '1.5'",
    "x=int64[1,,2]": "got ''",
    "x=int64[N]": "N has no size; write N=1024",
    "x=int64[N=2],y=int64[N=3]": "N is 2 and 3",
    "x=int64[1],x=int64[1]": "'x' is given twice",
    "x=int64[1],int64[1]": "inputs without a name come before",
    "x=int64[99999999999,99999999]": "at most 2**40 elements",
    "x=int64[99999999999999999999999]": "expected a size from 1 up",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_texts(text: str) -> None:
    with pytest.raises(TargetError, match=r"^--inputs") as caught:
        read(text)
    assert BAD[text] in str(caught.value)


def test_a_size_that_no_dimension_takes() -> None:
    with pytest.raises(
        TargetError, match="--seq-len has no effect: --inputs leaves no size of T open"
    ):
        read("int64[1,48]", seq_len=48)
    with pytest.raises(TargetError, match="--batch has no effect"):
        read("int64[B=4]", batch=48)
