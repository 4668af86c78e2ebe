"""Made-up routes for the tests of this directory."""

import numpy as np
from hypothesis import strategies as st


def valid_routes(rows, moe_layers, experts, topk, seed=0, dtype=np.int64):
    """Distinct experts per token, never all zero when that can be avoided."""
    rng = np.random.default_rng(seed)
    routes = np.argsort(rng.random((rows, moe_layers, experts)), axis=-1)[..., :topk]
    if routes.size and not routes.any():
        routes[0, 0, 0] = experts - 1
    return routes.astype(dtype)


@st.composite
def shapes(draw, max_rows=30):
    """(rows, moe_layers, experts, topk)."""
    experts = draw(st.integers(1, 12))
    return draw(st.integers(1, max_rows)), draw(st.integers(1, 4)), experts, draw(st.integers(1, experts))
