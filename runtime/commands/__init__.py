"""One file per command of the ``moedge`` program, imported when it is called; ``_*.py`` hold what several share."""
