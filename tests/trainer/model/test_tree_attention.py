"""Every way to compute attention over a tree gives what a dense mask gives, and the fastest that does so is taken."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention import varlen

from finetune_trainer.model import flex_tree, packed_attention, packing, varlen_rows
from finetune_trainer.model.batch import TokenPair
from finetune_trainer.model.flex_tree import flex
from finetune_trainer.model.packing import packs_of
from finetune_trainer.model.prefix_tree import Node, Pack
from finetune_trainer.model.tree_attention import Scores, Sight, by_path, dense, in_pieces, masked, tree_mask
from finetune_trainer.model.varlen_rows import side_by_side
from tests.trainer.model.row_trees import behind, trees

WINDOW = Sight(lambda _b, _h, q, kv: q - kv < 9, 9)
CHUNKS = Sight(lambda _b, _h, q, kv: q // 9 == kv // 9, 9)
SCORES = {
    "plain": Scores(0.25),
    "cap": Scores(0.25, cap=1.5),
    "sinks": Scores(0.25, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "bias": Scores(0.25, bias=torch.randn(1, 4, 1, 1000, generator=torch.Generator().manual_seed(0))),
}


def pack_behind(before: int, rows: list[TokenPair]) -> Pack:
    """All rows in one pack, which lies behind so many tokens."""
    if not before:
        return packs_of(rows, budget=10_000, share=True)[0]
    # All of the prefix is shared, and no more.
    rows = [(np.concatenate([[number], ids]), np.arange(len(ids) + 1) > 0) for number, (ids, _) in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MIN_SHARED", 1)
        cut, shared = packing._in_order(behind(before, rows), share=True)
        found = packing._behind(cut, shared, before, [(0, len(cut))])
    (pack,) = found.packs
    assert pack.before == before
    return pack


@settings(max_examples=30, deadline=None)
@given(rows=trees(), before=st.integers(1, 30))
@pytest.mark.parametrize("sight", [None, "window", "chunks"])
def test_what_lies_before_a_pack_is_seen_as_if_it_were_in_it(
    sight: str | None, rows: list[TokenPair], before: int
) -> None:
    pack = pack_behind(before, rows)
    seen = {None: None, "window": WINDOW, "chunks": CHUNKS}[sight]
    node = Node(0, before, before + pack.tokens)
    whole = replace(
        pack,
        before=0,
        input_ids=torch.cat([torch.zeros(1, before, dtype=torch.int64), pack.input_ids], 1),
        position_ids=torch.cat([torch.arange(before), pack.position_ids[0]])[None],
        span_end=torch.cat([torch.full((before,), node.span_end), pack.span_end + before]),
    )
    assert torch.equal(tree_mask(pack, seen), tree_mask(whole, seen)[before:])
    assert pack.key_nodes[0] == node


def attended(kind: str, pack: Pack, sight: Sight | None, scores: Scores, *tensors: torch.Tensor) -> Any:
    query, key, value = tensors
    if kind == "dense":
        return dense(query, key, value, tree_mask(pack, sight), scores)
    if kind == "in_pieces":
        return in_pieces(query, key, value, pack, sight, scores)
    return {"flex": flex, "masked": masked, "by_path": by_path}[kind](query, key, value, pack, sight, scores)


# Compiling takes a compiler and minutes; the tree is the same without.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sight", [None, WINDOW, CHUNKS], ids=["whole", "window", "chunks"])
@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=5, deadline=None)
@given(rows=trees(), before=st.sampled_from([0, 1, 30]))
def test_all_kinds_of_attention_agree(name: str, sight: Sight | None, rows: list[TokenPair], before: int) -> None:
    pack = pack_behind(before, rows)
    size, keys = pack.tokens, pack.before + pack.tokens
    scores = SCORES[name]
    scores = replace(scores, bias=None if scores.bias is None else scores.bias[..., :keys])
    shapes = (1, 4, size, 16), (1, 2, keys, 16), (1, 2, keys, 8)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    learned = [*tensors, scores.sinks.double().requires_grad_()] if scores.sinks is not None else tensors
    scores = replace(scores, sinks=learned[3] if scores.sinks is not None else None)
    weight = torch.randn(1, 4, size, 8, dtype=torch.float64)

    def outcome(kind: str) -> list[torch.Tensor]:
        if kind == "flex":  # It has no backward pass on a CPU.
            fixed = replace(scores, sinks=None if scores.sinks is None else scores.sinks.detach())
            return [attended(kind, pack, sight, fixed, *(tensor.detach() for tensor in tensors))]
        out = attended(kind, pack, sight, scores, *tensors)
        return [out, *torch.autograd.grad((out * weight).sum(), learned)]

    wanted = outcome("dense")
    kinds = ["by_path", "masked"]
    kinds += ["in_pieces"] if sight is None and name in ("plain", "sinks") else []
    kinds += ["flex"] if name != "bias" else []
    for kind in kinds:
        for found, right in zip(outcome(kind), wanted, strict=False):
            torch.testing.assert_close(found, right, atol=1e-9, rtol=1e-9)


def kernel_of_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    ends_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    **settings: Any,
) -> torch.Tensor:
    """As torch documents `varlen_attn`, which runs on GPUs only: [T, H, D], rows from one end to the next."""
    assert torch.equal(ends, ends_of_keys)
    assert ends.dtype is torch.int32
    assert longest == longest_of_keys == int(ends.diff().max())
    assert settings == {"scale": 0.25, "window_size": (-1, 0), "enable_gqa": True}
    parts = []
    for first, last in itertools.pairwise(ends.tolist()):
        q, k, v = (tensor[first:last].transpose(0, 1) for tensor in (query, key, value))
        parts.append(functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True))
    return torch.cat(parts, 1).transpose(0, 1)


@settings(max_examples=20, deadline=None)
@given(rows=trees())
def test_rows_side_by_side_are_what_the_tree_is(rows: list[TokenPair]) -> None:
    (pack,) = packs_of(rows, budget=10_000, share=False)
    q, k, v = (torch.randn(1, heads, pack.tokens, 16, dtype=torch.float64) for heads in (4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel_of_rows)
        found = side_by_side(q, k, v, pack, None, SCORES["plain"])
    torch.testing.assert_close(found, dense(q, k, v, tree_mask(pack), SCORES["plain"]), atol=1e-9, rtol=1e-9)


class OnGpu:
    """What is asked of a tensor when a kernel is chosen."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (1, 4, 600, size), dtype


ALONE = [(np.arange(first, first + 300), np.arange(300) > 3) for first in (0, 1000)]
TOGETHER = [(np.concatenate([np.arange(300), [first, first]]), np.arange(302) > 3) for first in range(900, 1200)]


@pytest.mark.parametrize(
    ("rows", "sight", "scores", "query", "value", "chosen"),
    [
        (ALONE, None, "plain", OnGpu(64), OnGpu(64), side_by_side),
        (TOGETHER, None, "plain", OnGpu(64), OnGpu(64), flex),
        (ALONE[:1], None, "plain", OnGpu(64), OnGpu(64), masked),
        (ALONE[:1], None, "bias", OnGpu(64), OnGpu(64), by_path),
        (ALONE, WINDOW, "plain", OnGpu(64), OnGpu(64), flex),
        (ALONE, None, "cap", OnGpu(64), OnGpu(64), flex),
        (ALONE, None, "sinks", OnGpu(64), OnGpu(64), flex),
        (ALONE, None, "bias", OnGpu(64), OnGpu(64), by_path),
        # FlashAttention has half precision, one size for all, up to 256.
        (ALONE, None, "plain", OnGpu(64, torch.float32), OnGpu(64), flex),
        (ALONE, None, "plain", OnGpu(64), OnGpu(32), flex),
        (ALONE, None, "plain", OnGpu(512), OnGpu(512), flex),
        (ALONE, None, "plain", OnGpu(8), OnGpu(8), side_by_side),
        (TOGETHER, None, "plain", OnGpu(8), OnGpu(8), by_path),
    ],
)
def test_the_kernel_on_a_gpu_is_one_that_does_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    rows: list[TokenPair],
    sight: Sight | None,
    scores: str,
    query: Any,
    value: Any,
    chosen: Any,
) -> None:
    monkeypatch.setattr(varlen_rows, "_has_kernel", lambda _device: True)
    (pack,) = packs_of(rows, budget=10_000, share=True)
    assert packed_attention._kernel(query, value, pack, sight, SCORES[scores]) is chosen


def test_a_device_without_the_kernel_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    (pack,) = packs_of(ALONE, budget=10_000, share=True)
    gpu: Any = OnGpu(64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    varlen_rows._has_kernel.cache_clear()
    assert packed_attention._kernel(gpu, gpu, pack, None, SCORES["plain"]) is flex
    varlen_rows._has_kernel.cache_clear()


@pytest.mark.parametrize("sight", [None, WINDOW, CHUNKS], ids=["whole", "window", "chunks"])
@settings(max_examples=50, deadline=None)
@given(rows=trees(), block=st.sampled_from([2, 8, 128]), before=st.sampled_from([0, 1, 8, 30]))
def test_the_block_mask_is_the_tree(sight: Sight | None, rows: list[TokenPair], block: int, before: int) -> None:
    pack = pack_behind(before, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_tree, "_BLOCK", block)
        flex_tree._block_mask.cache_clear()
        found = flex_tree._block_mask(pack, sight)
        flex_tree._block_mask.cache_clear()
    wanted = tree_mask(pack, sight)
    size, keys = -(-pack.tokens // block), -(-(before + pack.tokens) // block)
    padded = functional.pad(wanted, (0, -(before + pack.tokens) % block, 0, -pack.tokens % block))
    squares = padded.view(size, block, keys, block)
    full, touched = squares.all(3).all(1), squares.any(3).any(1)

    def listed(numbers: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        there = torch.zeros(size, keys, dtype=torch.bool)
        for row in range(size):
            there[row, columns[0, 0, row, : numbers[0, 0, row]].long()] = True
        return there

    partly, wholly = (
        listed(found.kv_num_blocks, found.kv_indices),
        listed(found.full_kv_num_blocks, found.full_kv_indices),
    )
    assert not (partly & wholly).any()
    assert not (wholly & ~full).any(), "in full blocks nothing is masked"
    assert not (touched & ~(partly | wholly)).any(), "what is attended to is computed"
    if sight is None:
        assert int((partly | wholly).sum()) <= int(touched.sum()) + size, "little else is"
    elif len(rows) == 1:
        most = 2 + (9 - 1) // block
        assert int((partly | wholly).sum(1).max()) <= most, "what a window cannot reach is skipped"
