"""Recipes, tolerances and pinned assets: plain data, checked when it is read."""
