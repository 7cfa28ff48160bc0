"""One file per command of the ``moedge`` program; :mod:`moedge.runtime.cli` declares their options."""
