"""Frozen records that the planner, the engines and the job share."""

from fanfold.extras import make_callable

make_callable(__name__)
