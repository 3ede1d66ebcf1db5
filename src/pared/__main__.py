"""`python -m pared`: the same program as `pared`."""

from pared.cli import main

if __name__ == "__main__":
    main()
