"""The error that a user's input causes, as opposed to a defect of the package, and checks that raise it."""


class UserError(ValueError):
    """Input that cannot work: the message is one sentence naming the culprit and the mend.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def require_share(**values: float) -> None:
    """Raise `UserError` for the first of these settings that is not in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; give a number from 0 to 1")


def require_positive(**values: float) -> None:
    """Raise `UserError` for the first of these settings that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} is {value}; give a number above 0")
