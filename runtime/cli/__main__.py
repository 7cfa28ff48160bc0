"""``python -m moedge.runtime.cli``."""

from moedge.runtime.cli import main

main()
