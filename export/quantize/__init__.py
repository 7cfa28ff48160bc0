"""Block formats of integer weights, and what is measured to choose them."""
