"""One model over several units: weights and work are split, the result is that of the whole model."""
