"""Turn a dense model into a MoE checkpoint: statistics -> plan -> apply -> save."""
