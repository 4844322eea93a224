"""One pass over the vocabulary in tiles against all logits at once."""

from __future__ import annotations

import pytest
import torch

from capo_rl.curvature.head import Head
from capo_rl.curvature.last_layer import _TILE, last_layer, likeliest


def in_tiles(head: Head, size: int):
    """The head's rows `size` at a time, as they come where it is sharded."""
    for first in range(0, len(head.weight), size):
        rows = slice(first, first + size)
        yield first, head.weight[rows], None if head.bias is None else head.bias[rows]


def a_head(tokens, vocabulary, d, bias=True, dtype=torch.float64):
    draw = torch.Generator().manual_seed(tokens + 7 * vocabulary + 31 * d)
    weight = torch.randn(vocabulary, d, generator=draw, dtype=dtype)
    shift = torch.randn(vocabulary, generator=draw, dtype=dtype) if bias else None
    hidden = torch.randn(tokens, d, generator=draw, dtype=dtype)
    actions = torch.randint(0, vocabulary, (tokens,), generator=draw)
    return Head(weight, shift, scale=1.7), hidden, actions


def by_row(layer):
    """π and u of each token over the whole vocabulary, whatever the order of its support."""
    size = int(layer.support.max()) + 1 if layer.support.numel() else 0
    pi, u = (torch.zeros(len(layer), size, dtype=layer.pi.dtype) for _ in range(2))
    return pi.scatter_add_(1, layer.support, layer.pi), u.scatter_add_(1, layer.support, layer.u)


@pytest.mark.parametrize("top_p", [None, 0.6])
@pytest.mark.parametrize("top_k", [1, 3, 10, 36, 37, None])
@pytest.mark.parametrize("tile", [1, 5, 12, 37, 100])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_tiles_of_rows_give_the_last_layer_of_all_logits(monkeypatch, top_k, top_p, tile, tokens):
    head, hidden, actions = a_head(tokens, 37, 4)
    logits = (hidden @ head.weight.T + head.bias) * head.scale
    expected = last_layer(hidden, logits, actions, temperature=0.7, top_k=top_k, top_p=top_p)
    monkeypatch.setattr(Head, "_tiles", lambda self: in_tiles(self, tile))
    layer = head.last_layer(hidden, actions, temperature=0.7, top_k=top_k, top_p=top_p)
    for got, want in zip(by_row(layer), by_row(expected), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.log_pi_a, expected.log_pi_a)
    torch.testing.assert_close(layer.missing_mass, expected.missing_mass)
    assert layer.support.shape == expected.support.shape
    assert (layer.sizes is None) == (expected.sizes is None) == (top_p is None)
    assert layer.sizes is None or torch.equal(layer.sizes, expected.sizes)


@pytest.mark.parametrize("quickselect", [0, 512])
@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (5, 1), (37, 36), (600, 1), (600, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_likeliest_rows_are_those_a_sort_puts_first(monkeypatch, quickselect, vocabulary, k, dtype):
    monkeypatch.setattr("capo_rl.curvature.last_layer._QUICKSELECT", quickselect)
    draw = torch.Generator().manual_seed(vocabulary)
    z = torch.randint(-3 * vocabulary, 3 * vocabulary, (9, vocabulary), generator=draw).to(dtype) / 7  # some are equal
    z[1, vocabulary // 2], z[2, 0], z[3] = torch.nan, -torch.inf, 0.0
    top, support = likeliest(z, k)
    torch.testing.assert_close(top, z.gather(1, support), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        top.sort(dim=1, descending=True).values,
        z.sort(dim=1, descending=True).values[:, :k],
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert all(len(set(rows)) == k for rows in support.tolist())


@pytest.mark.parametrize("tile", [4, 37])
def test_log_pi_at_some_rows(monkeypatch, tile):
    head, hidden, actions = a_head(6, 37, 4, bias=False)
    rows = torch.stack([actions, torch.arange(6), torch.full((6,), 36)], dim=1)
    monkeypatch.setattr(Head, "_tiles", lambda self: in_tiles(self, tile))
    logits = hidden @ head.weight.T * head.scale / 0.7
    torch.testing.assert_close(head.log_pi(hidden, rows, 0.7), logits.log_softmax(-1).gather(1, rows))


def test_blocks_of_tokens_that_do_not_divide_them(monkeypatch):
    head, hidden, actions = a_head(50, 37, 4)
    whole = head.last_layer(hidden, actions, top_k=5)
    monkeypatch.setitem(_TILE, "cpu", 7 * 2048)  # 7 tokens at a time
    blocks = head.last_layer(hidden, actions, top_k=5)
    for got, want in zip(by_row(blocks), by_row(whole), strict=True):
        torch.testing.assert_close(got, want)


def test_half_precision_is_projected_in_its_own_dtype_and_summed_in_float32():
    head, hidden, actions = a_head(8, 300, 16, dtype=torch.float32)
    half = Head(head.weight.bfloat16(), head.bias.bfloat16(), head.scale)
    layer = half.last_layer(hidden, actions, top_k=20)
    assert layer.pi.dtype == torch.float32
    exact = Head(half.weight.double(), half.bias.double(), head.scale).last_layer(hidden.double(), actions)
    assert (layer.log_pi_a - exact.log_pi_a).abs().max() < 0.2
