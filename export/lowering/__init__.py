"""Lowering: rewrite the portable graph for one target, with a legality check and an executed self-test."""
