"""Recipes, tolerances and their typed schema."""
