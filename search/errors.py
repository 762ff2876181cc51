"""What is wrong with a user's input."""


class InputError(ValueError):
    """The user's input is wrong; the message is one line: found, allowed, what to do next."""
