"""`shoal` and `python -m shoal`."""


def main() -> None:
    from .cli import run

    run()


if __name__ == "__main__":
    main()
