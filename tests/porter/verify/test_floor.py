from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from porter.verify import floor
from porter.verify.cases import cases_for, fresh
from porter.verify.floor import (
    doubled_key,
    lost_keys,
    lost_mask,
    permuted_keys,
    reference,
    run_replaced,
)
from porter.verify.gate import CEILING, relative_error, sabotage_shows
from porter.verify.hooks import AttentionCall, denoisers, replaced_attention


def test_both_ways_of_calling_attention_are_seen() -> None:
    seen: list[AttentionCall] = []

    def note(call: AttentionCall) -> torch.Tensor:
        seen.append(call)
        return call.run()

    q = torch.randn(1, 6, 2, 4)
    with replaced_attention(note):
        dispatched = dispatch_attention_fn(q, q, q)
        plain = torch.nn.functional.scaled_dot_product_attention(
            *(3 * [q.transpose(1, 2)])
        )
    assert len(seen) == 2
    assert all(call.key.shape == (1, 2, 6, 4) for call in seen)
    assert torch.equal(dispatched, plain.transpose(1, 2))


def test_permuted_keys_change_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 37, 37))
    mask = torch.randn(2, 1, 5, 37)
    call = AttentionCall(q, k, v, attn_mask=mask)
    torch.testing.assert_close(permuted_keys(call), call.run())
    # Permuting without the mask is another function: the check can fail.
    order = torch.arange(36, -1, -1)
    wrong = AttentionCall(q, k[:, :, order], v[:, :, order], attn_mask=mask)
    assert not torch.allclose(wrong.run(), call.run(), atol=1e-2)


@pytest.mark.parametrize(("output_type", "orders"), [("latent", 1), ("pt", 4)])
def test_the_floor_of_a_decoder_is_the_largest_of_several(
    pixart: Any, monkeypatch: pytest.MonkeyPatch, output_type: str, orders: int
) -> None:
    errors = [1e-8, 2e-8, 3e-6, 1e-8][:orders]
    left = iter(errors)
    monkeypatch.setattr(floor, "relative_error", lambda found, expected: next(left))
    numbers = []

    def permuted(call: AttentionCall, number: int) -> torch.Tensor:
        numbers.append(number)
        return permuted_keys(call, number)

    monkeypatch.setattr(floor, "permuted_keys", permuted)
    call = fresh(pixart, cases_for(pixart)[0])
    stock = reference(pixart, lambda: {**call(), "output_type": output_type})
    assert stock.floor == max(errors) and next(left, None) is None
    assert set(numbers) == set(range(orders))


def test_orders_differ() -> None:
    q, k, v = (torch.randn(1, 1, n, 8) for n in (5, 37, 37))
    seen = [
        permuted_keys(AttentionCall(q, k, v, attn_mask=None), number)
        for number in range(4)
    ]
    for number, found in enumerate(seen[1:]):
        torch.testing.assert_close(found, seen[number])
        assert not torch.equal(found, seen[number])


def test_only_the_denoiser_is_touched(pixart: Any) -> None:
    assert set(denoisers(pixart)) == {"transformer"}


def test_every_case_is_lively(pixart: Any) -> None:
    for case in cases_for(pixart):
        call = fresh(pixart, case)
        stock = reference(pixart, call)
        assert 0 < stock.floor < CEILING / 20, case.name
        for sabotage in (lost_keys, lost_mask, doubled_key):
            error = relative_error(run_replaced(pixart, call, sabotage), stock.outputs)
            assert sabotage_shows(error, stock.floor), (case.name, sabotage.__name__)


def test_hooks_leave_the_pipeline_as_it_was(pixart: Any) -> None:
    call = fresh(pixart, cases_for(pixart)[0])
    with pytest.raises(RuntimeError, match="stop"):
        run_replaced(pixart, call, _stop)
    assert not pixart.transformer._forward_hooks
    assert not pixart.transformer._forward_pre_hooks


def _stop(call: AttentionCall) -> torch.Tensor:
    raise RuntimeError("stop")
