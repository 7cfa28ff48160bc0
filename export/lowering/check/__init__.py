"""Executed checks of rewritten blocks, and the known mistakes that they name."""
