"""Is it the same model? Comparisons, route replay, verdicts."""
