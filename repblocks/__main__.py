"""``python -m repblocks``."""

from repblocks.cli import main

if __name__ == "__main__":
    main()
