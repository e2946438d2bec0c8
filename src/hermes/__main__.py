"""Where `hermes` and `python -m hermes` begin: Ctrl-C ends either alike, even while the command is being imported."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command, and end the process."""
    try:
        from hermes.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
