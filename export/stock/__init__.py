"""Checkpoints that stock transformers, vLLM and SGLang load."""
