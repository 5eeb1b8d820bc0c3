"""``python -m normtune``."""

from normtune.cli import main

if __name__ == "__main__":
    main()
