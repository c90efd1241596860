"""`python -m fastjepa` is `fastjepa`."""

from fastjepa.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
