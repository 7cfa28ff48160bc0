"""Run, verify, benchmark and report on bundles. Imports neither torch nor transformers."""
