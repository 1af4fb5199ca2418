"""One model over several units: weights and work are split, the result is that of the whole model."""

from fanfold.extras import make_callable

make_callable(__name__)
