"""``moedge history``: stored results over time."""
