"""One step, without a trainer: which weights, measure, decide, mask."""
