"""Training after the conversion: fine-tuning, retraining, what is trained and how experts stay in balance."""
