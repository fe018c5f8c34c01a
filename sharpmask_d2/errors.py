"""What a user can mend."""


class UserError(ValueError):
    """Something from outside cannot be used: a file, an image, a config, an option. The message says which one, and what to do.

    The tools print its message alone (see `command.run`). Anything that cannot be the user's doing is another exception.
    """
