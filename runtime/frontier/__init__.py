"""``moedge frontier``: conversions side by side on several targets, their quality beside their measured speed."""
