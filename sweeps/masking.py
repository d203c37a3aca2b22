"""The command of the study `masking` of sweeps/studies.py."""

from sweeps.studies import main

if __name__ == "__main__":
    main("masking")
