"""``moedge doctor``: what is installed here and what it makes possible."""

from __future__ import annotations
