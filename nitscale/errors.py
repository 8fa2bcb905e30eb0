"""Errors that a user caused and a user can mend; the command line prints them without a traceback."""


class UserError(ValueError):
    """Names the thing, its value, and the way out."""
