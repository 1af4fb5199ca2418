"""Models that vote, and models whose probabilities are averaged, are right more often than one of them.

python examples/ensemble.py    (needs scikit-learn)
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.tree import DecisionTreeClassifier

import fanfold as ff


def main() -> None:
    data, labels = load_digits(return_X_y=True)
    data, test, labels, truth = train_test_split(data, labels, random_state=0)

    def train(seeds):
        """A tree on a random sample of the rows, for each seed."""
        trees = []
        for seed in seeds:
            rows = np.random.default_rng(seed).integers(0, len(data), len(data))
            trees.append(DecisionTreeClassifier(max_features="sqrt", random_state=seed).fit(data[rows], labels[rows]))
        return trees

    trees = ff.map(train, list(range(30)))
    right = [(tree.predict(test) == truth).mean() for tree in trees]
    voted = ff.fold(lambda members: [tree.predict(test) for tree in members], trees, ff.Vote())
    mean = ff.fold(lambda members: [tree.predict_proba(test) for tree in members], trees, ff.EnsembleMean())
    print(f"one tree: {np.mean(right):.3f} on average, {max(right):.3f} the best of {len(trees)}")
    print(f"their vote: {(voted == truth).mean():.3f}")
    print(f"the mean of their probabilities: {(mean.argmax(1) == truth).mean():.3f}")
    assert (voted == truth).mean() > max(right)


if __name__ == "__main__":
    main()
