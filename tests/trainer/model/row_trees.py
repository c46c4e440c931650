"""Rows that begin alike, as hypothesis draws them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from finetune_trainer.model.batch import TokenPair

VOCABULARY = 50


@st.composite
def trees(draw: st.DrawFn) -> list[TokenPair]:
    """Rows that leave each other's path at random places."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows: list[TokenPair] = []
    for _ in range(draw(st.integers(1, 7))):
        start = rows[draw(st.integers(0, len(rows) - 1))][0] if rows else np.zeros(0, dtype=np.int64)
        kept = start[: draw(st.integers(0, len(start)))]
        own = generator.integers(0, VOCABULARY, draw(st.integers(1, 60)))
        ids = np.concatenate([kept, own]).astype(np.int64)
        rows.append((ids, generator.random(len(ids)) < draw(st.sampled_from([0.0, 0.1, 1.0]))))
    return rows


def behind(prefix: int, rows: list[TokenPair]) -> list[TokenPair]:
    """The rows with so many tokens more in front of each, which nothing predicts."""
    ids = np.random.default_rng(prefix).integers(0, VOCABULARY, prefix)
    return [
        (np.concatenate([ids, own]), np.concatenate([np.zeros(prefix, dtype=bool), trained])) for own, trained in rows
    ]
