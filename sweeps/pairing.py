"""The command of the study `pairing` of sweeps/studies.py."""

from sweeps.studies import main

if __name__ == "__main__":
    main("pairing")
