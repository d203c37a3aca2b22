"""The one exception for input that the user can mend."""


class UserError(Exception):
    """Wrong input: its message is one line that says what, where, found, expected and what to do.

    The command line prints it on stderr and exits with code 2.
    """
