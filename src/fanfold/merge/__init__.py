"""Merges: associative ways to join what pieces give, and the tree in which they fold. Imports no NumPy."""

from fanfold.merge.gather import Concat
from fanfold.merge.merge import Merge, OrderedFold, fold
from fanfold.merge.sums import Count, Mean, Sum, Weighted

__all__ = ["Concat", "Count", "Mean", "Merge", "OrderedFold", "Sum", "Weighted", "fold"]
