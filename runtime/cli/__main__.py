"""``python -m moedge.runtime.cli``."""

from moedge.runtime.cli import main

if __name__ == "__main__":
    main()
