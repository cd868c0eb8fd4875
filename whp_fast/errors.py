"""The one exception a person is meant to read."""


class UserError(Exception):
    """Something the person who runs the program can mend.

    The message is one sentence that names the file or field, says what was found and what to do. The command
    line prints it without a traceback and leaves with status 2 (``--debug`` shows the traceback too).
    """
