"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input. Its text is one line: the key or file, what is wrong with it, what to do.

    The CLI prints it without a traceback and exits with status 2; drivers never retry it.
    """
