"""``python -m moedge``, for launchers such as torchrun; the same as the command ``moedge``."""

from moedge.runtime.cli import main

if __name__ == "__main__":
    main()
