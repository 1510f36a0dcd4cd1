"""A small engine: random keys, values and queries, and attention to compare with."""

from __future__ import annotations

import numpy as np

import twilight_client as tw

LAYERS, QUERY_HEADS, KV_HEADS, DIM, PAGE = 2, 4, 2, 32, 16
DENSE = {"skip_first_two_layers": False}
SPARSE = {
    "selector": {"type": "quest", "token_budget": 96},
    "weight_estimator": {"type": "min_max_quant"},
    "weight_pruner": {"type": "top_p", "threshold": 0.9},
    "skip_first_two_layers": False,
}
GEOMETRY = tw.Geometry(LAYERS, QUERY_HEADS, KV_HEADS, DIM)


class Engine:
    """Decodes sequences of random keys and values in pages of 16, the same for every engine."""

    def __init__(self, session: tw.Session, pages: int = 64) -> None:
        self.session = session
        self.rng = np.random.default_rng(1)
        nbytes = 2 * LAYERS * pages * PAGE * KV_HEADS * DIM * 4
        self.kv = session.new_buffer(nbytes, tw.Access.READ_ONLY)
        # [K or V, layer, page, token, head, dim]; the SDK takes the heads before the tokens.
        self.data = self.kv.numpy(np.float32, (2, LAYERS, pages, PAGE, KV_HEADS, DIM))
        keys, values = self.data.transpose(0, 1, 2, 4, 3, 5)
        self.cache = session.register_tensors(list(keys), list(values))

    def write(self, table: list[int], start: int, end: int) -> None:
        for t in range(start, end):
            self.data[:, :, table[t // PAGE], t % PAGE] = self.rng.standard_normal((2, LAYERS, KV_HEADS, DIM))

    def query(self, rows: int = 1) -> np.ndarray:
        return self.rng.standard_normal((rows, QUERY_HEADS, DIM)).astype(np.float32)

    def dense(self, layer: int, query: np.ndarray, table: list[int], length: int, first: int = 0) -> np.ndarray:
        """Attention of one row [Hq, dim] in float64."""
        k, v = (x[layer, table].reshape(-1, KV_HEADS, DIM)[first:length].astype(np.float64) for x in self.data)
        heads = []
        for h in range(QUERY_HEADS):
            logits = k[:, h * KV_HEADS // QUERY_HEADS] @ query[h] / np.sqrt(DIM)
            weights = np.exp(logits - logits.max())
            heads.append(weights @ v[:, h * KV_HEADS // QUERY_HEADS] / weights.sum())
        return np.stack(heads)
