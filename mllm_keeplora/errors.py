"""The base of every error whose message is written for the user."""


class KeepLoRAError(Exception):
    """Says what is wrong, where, what was expected and what to do; commands print it without a traceback."""
