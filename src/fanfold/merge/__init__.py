"""Merges: associative ways to join what pieces give, and the tree in which they fold. Imports no NumPy."""

from fanfold.merge.distinct import Distinct
from fanfold.merge.extremes import ArgMax, MinMax
from fanfold.merge.gather import Concat
from fanfold.merge.histogram import Histogram
from fanfold.merge.merge import Merge, OrderedFold, fold
from fanfold.merge.moments import Moments
from fanfold.merge.quantiles import Quantiles
from fanfold.merge.record import Record
from fanfold.merge.softmax import SoftmaxPart, SoftmaxParts
from fanfold.merge.sums import Count, Mean, Sum, Weighted
from fanfold.merge.top import TopK
from fanfold.merge.vote import EnsembleMean, Vote

__all__ = [
    "ArgMax",
    "Concat",
    "Count",
    "Distinct",
    "EnsembleMean",
    "Histogram",
    "Mean",
    "Merge",
    "MinMax",
    "Moments",
    "OrderedFold",
    "Quantiles",
    "Record",
    "SoftmaxPart",
    "SoftmaxParts",
    "Sum",
    "TopK",
    "Vote",
    "Weighted",
    "fold",
]
