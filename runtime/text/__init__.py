"""Text in and out: tokenizer, streaming, generation."""
