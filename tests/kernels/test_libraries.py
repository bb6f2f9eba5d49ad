"""Other libraries' kernels race ours: never chosen unseen, called by the operands they want, right or not taken."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from lowvram.selftest.checks import kernel_check, kernel_checks, makers
from lowvram.selftest.results import Result, Subject, judge
from lowvram.selftest.trials import SMALL
from lowvram_kernels import chips, choices, libraries
from lowvram_kernels.attention import attention, sdpa
from lowvram_kernels.choices import RIVALS, TRITON
from lowvram_kernels.libraries import COMFY, CUDNN, SAGE, TORCHAO
from lowvram_kernels.linear import linear_q8, reference_w8a8
from lowvram_kernels.rows import reference_rows
from lowvram_kernels.trace import trace_kernels

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
MAKERS = dict(makers())
PAIRS = [(operation, rival) for operation, every in RIVALS.items() for rival in every]


def int_product(a, b):
    assert a.dtype is b.dtype is torch.int8
    return (a.double() @ b.double()).to(torch.int32)


def heads_first(q, k, v):
    """[B, N, L, H], in 16 bits."""
    assert q.dtype is not torch.float32
    return F.scaled_dot_product_attention(q, k, v)


def tokens_first(q, k, v, *, tensor_layout, is_causal):
    assert (tensor_layout, is_causal) == ("NHD", False)
    return heads_first(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.fixture
def here(monkeypatch):
    """The libraries, by the names that they are called by, computing on a processor; a card that they serve."""
    made: dict[str, ModuleType] = {}

    def module(name: str, **members: object) -> None:
        made[name] = ModuleType(name)
        vars(made[name]).update(members)
        monkeypatch.setitem(sys.modules, name, made[name])

    module("torchao")
    module("torchao.kernel")
    module("torchao.kernel.intmm", int_matmul=int_product)
    module("comfy_kitchen", mm_int8=int_product)
    module("comfy_kitchen.sage_attention", int8_attention=heads_first)
    module("sageattention", sageattn=tokens_first)
    monkeypatch.setattr(choices, "installed", lambda backend: True)
    monkeypatch.setattr(
        libraries, "_cudnn_attention", lambda q, k, v: tokens_first(q, k, v, tensor_layout="NHD", is_causal=False)
    )
    monkeypatch.setitem(libraries._ATTENTIONS, CUDNN, libraries._cudnn_attention)
    with choices.restored():
        yield made


@pytest.mark.parametrize(("operation", "rival"), PAIRS)
def test_a_rival_runs_only_where_it_is_preferred(here, monkeypatch, operation, rival):
    monkeypatch.setattr(choices, "triton_serves", lambda device: True)
    first = choices.choose(operation, CARD)
    assert rival in choices.rivals(operation, CARD)
    assert rival not in choices.backends(operation, CARD)
    choices.prefer(operation, rival, CARD, "0.5 ms at 14B shapes")
    assert choices.choose(operation, CARD) == rival
    assert first in choices.backends(operation, CARD)
    choices.switch_off(operation, rival, CARD, "it hangs")
    assert choices.choose(operation, CARD) == first


@pytest.mark.parametrize(("operation", "rival"), PAIRS)
def test_what_is_not_installed_is_no_choice(monkeypatch, operation, rival):
    monkeypatch.setattr(choices, "installed", lambda backend: False)
    assert choices.rivals(operation, CARD) == ()
    with pytest.raises(ValueError, match="which it does not serve"):
        choices.prefer(operation, rival, CARD, "why")


@pytest.mark.parametrize(("operation", "rival"), PAIRS)
def test_a_processor_has_no_rivals(here, operation, rival):
    assert choices.rivals(operation, CPU) == ()
    with pytest.raises(ValueError, match="preferred on cpu, which it does not serve"):
        choices.prefer(operation, rival, CPU, "why")


def test_nothing_is_imported_for_the_question():
    libraries.installed.cache_clear()
    before = set(sys.modules)
    for rival in (CUDNN, SAGE, COMFY, TORCHAO, "nobody"):
        libraries.installed(rival)
    assert not {"torchao", "comfy_kitchen", "sageattention"} & (set(sys.modules) - before)
    assert libraries.installed(CUDNN)
    assert not libraries.installed("nobody")


def chosen(monkeypatch, backend: str) -> None:
    """As if the selftest had preferred it, on this processor."""
    monkeypatch.setattr("lowvram_kernels.linear.choose", lambda *_: backend)
    monkeypatch.setattr("lowvram_kernels.attention.choose", lambda *_: backend)


@pytest.mark.parametrize("rival", [TORCHAO, COMFY])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_products_meet_the_reference(here, monkeypatch, rival, gelu, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(19, 48), torch.randn(24, 48)
    q, scale = reference_rows(x, torch.int8)
    weight, scales = reference_rows(weight, torch.int8)
    more = torch.randn(24) if bias else None
    chosen(monkeypatch, rival)
    with trace_kernels() as counts:
        out = linear_q8(q, scale, weight, scales[:, 0], more, gelu=gelu, dtype=torch.float32)
    expected = reference_w8a8(x, weight, scales[:, 0], more, gelu=gelu)
    assert (out.double() - expected).norm() / expected.norm() < 1e-5
    assert dict(counts) == {("linear_w8a8", f"int8: {rival}"): 1}


@pytest.mark.parametrize("rival", [CUDNN, SAGE, COMFY])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_attention_by_another_library(here, monkeypatch, rival, lead):
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, tokens, 5, 16).bfloat16() for tokens in (7, 11, 11))
    chosen(monkeypatch, rival)
    with trace_kernels() as counts:
        out = attention(q, k, v)
    assert out.shape == q.shape
    assert (out.float() - sdpa(q, k, v).float()).norm() / out.float().norm() < 0.01
    assert dict(counts) == {("attention", f"bfloat16: {rival}"): 1}
    # In float32 it stays PyTorch's: none of them computes in as many bits.
    with trace_kernels() as counts:
        assert torch.equal(attention(q.float(), k.float(), v.float()), sdpa(q.float(), k.float(), v.float()))
    assert all("torch" in kind for _, kind in counts)


@pytest.mark.parametrize(("operation", "rival"), PAIRS)
def test_the_selftest_checks_a_rival_as_any_other(here, operation, rival):
    result = kernel_check(operation, rival, SMALL, CPU, MAKERS[operation]).run()
    assert result.status == "passed", result.message
    assert result.seconds > 0


def test_attention_in_eight_bits_does_not_stand_for_sixteen(here, monkeypatch):
    """Queries, keys and values in int8, a scale a token, softmax exact: what the best of such kernels gives."""

    def eight_bit(q, k, v):
        def rounded(t):
            scale = t.float().abs().amax(-1, keepdim=True) / 127
            return (t.float() / scale).round() * scale

        return F.scaled_dot_product_attention(*(rounded(t) for t in (q, k, v))).to(q.dtype)

    here["comfy_kitchen.sage_attention"].int8_attention = eight_bit
    result = kernel_check("attention", COMFY, SMALL, CPU, MAKERS["attention"]).run()
    assert result.status == "failed"
    assert "it computes wrongly" in result.message


def test_a_card_is_checked_with_what_is_installed(here, monkeypatch):
    monkeypatch.setattr(choices, "triton_serves", lambda device: True)
    monkeypatch.setattr(chips, "_capability", lambda device: 89)
    subjects = [check.subject for check in kernel_checks(CARD)]
    for operation, rival in PAIRS:
        sizes = [one.size for one in subjects if (one.operation, one.backend) == (operation, rival)]
        assert sizes == ["small", "14B"], (operation, rival)
    assert len({one.name for one in subjects}) == len(subjects)


def checked(backend: str, seconds: float | None, status: str = "passed", size: str = "14B") -> Result:
    operation = "linear_w8a8 int8"
    subject = Subject(name=f"{operation}: {backend}, {size}", operation=operation, backend=backend, size=size)
    return Result(subject=subject, status=status, seconds=seconds)


@pytest.mark.parametrize(
    ("seconds", "small", "preferred"),
    [
        (0.5, "passed", True),
        (0.99, "passed", False),
        (0.5, "failed", False),
        (0.5, "skipped", False),
        (0.5, None, True),
    ],
)
def test_a_rival_is_taken_where_it_is_right_and_faster(seconds, small, preferred):
    results = [checked(TRITON, 1.0), checked(choices.INT_MM, 2.0), checked(COMFY, seconds)]
    results += [checked(COMFY, None, small, "small")] if small else []
    verdict = judge(results)
    assert [one.backend for one in verdict.preferred] == ([COMFY] if preferred else [])
    assert verdict.off == verdict.stuck == ()


def test_a_rival_takes_no_place_of_what_fails():
    """Where our own fails it is PyTorch's that comes instead, unless the rival is faster than that."""
    results = [checked(TRITON, None, "failed"), checked(choices.INT_MM, 1.0), checked(COMFY, 0.5)]
    verdict = judge(results)
    assert [(one.backend, one.instead) for one in verdict.off] == [(TRITON, choices.INT_MM)]
    assert [one.backend for one in verdict.preferred] == [COMFY]


def test_the_installed_versions_are_part_of_what_results_hold_for(monkeypatch):
    from lowvram.selftest import cache

    monkeypatch.setattr(libraries, "installed", lambda backend: backend in (SAGE, COMFY))
    monkeypatch.setattr(libraries, "version", lambda name: {SAGE: "2.2", COMFY: "0.2.40"}[name])
    assert cache.identity_of(CPU).libraries == "sageattention 2.2, comfy-kitchen 0.2.40"
    monkeypatch.setattr(libraries, "installed", lambda backend: False)
    assert cache.identity_of(CPU).libraries == "none"


@pytest.mark.parametrize("rival", [TORCHAO, COMFY])
def test_those_that_are_here(rival):
    """The libraries themselves, where somebody installed them."""
    pytest.importorskip(libraries.MODULES[rival])
    torch.manual_seed(0)
    q, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((33, 64), (48, 64)))
    assert torch.equal(libraries.int8_product(rival, q, weight).long(), q.long() @ weight.long().t())
