"""Self-attention over keys that are cut into pieces equals attention over all keys.

python examples/attention.py [PIECES]
"""

from __future__ import annotations

import sys

import numpy as np

import fanfold as ff


def main() -> None:
    pieces = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    heads, length, width = 4, 512, 32
    draw = np.random.default_rng(0)
    query, key, value = draw.standard_normal((3, heads, length, width))

    scores = query @ key.swapaxes(1, 2) / np.sqrt(width)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    whole = weights / weights.sum(-1, keepdims=True) @ value

    def attend(positions):
        """Scores of all queries against the keys at these positions, and their values."""
        return query @ key[:, positions].swapaxes(1, 2) / np.sqrt(width), value[:, positions]

    merged = ff.fold(attend, np.arange(length), ff.SoftmaxParts(), pieces=pieces)
    print(f"{length} keys in {pieces} pieces: at most {np.abs(merged - whole).max():.1e} from the whole")
    assert np.allclose(merged, whole, rtol=0, atol=1e-14)


if __name__ == "__main__":
    main()
