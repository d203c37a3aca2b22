"""The command of the study `padding` of sweeps/studies.py."""

from sweeps.studies import main

if __name__ == "__main__":
    main("padding")
