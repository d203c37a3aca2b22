"""The command of the study `routers` of sweeps/studies.py."""

from sweeps.studies import main

if __name__ == "__main__":
    main("routers")
