"""`python -m hermes` is `hermes`."""

from hermes.cli.app import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
