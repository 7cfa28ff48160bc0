"""What an engine's answers are worth: log-likelihoods, lm-eval tasks, and two models' answers side by side."""
