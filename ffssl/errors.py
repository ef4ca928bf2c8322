"""What a user can put right."""


class UserError(Exception):
    """A mistake in the input: a file, an option, a sample.

    The message is one line that names the culprit and says what to do. Programs print it without a traceback and
    leave with status 2.
    """
