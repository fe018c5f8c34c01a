"""The error that a user can correct."""


class UserError(ValueError):
    """An input cannot be used: a file, an image, a config key or an option. The message names the input and says what to do.

    The command-line tools print only the message (see `cli.command.run`). Errors that no input can cause are other exceptions.
    """
