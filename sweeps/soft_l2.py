"""The command of the study `soft_l2` of sweeps/studies.py."""

from sweeps.studies import main

if __name__ == "__main__":
    main("soft_l2")
