"""The error that a user's input causes, as opposed to a defect of the package."""


class UserError(ValueError):
    """Input that cannot work: the message is one sentence naming the culprit and the mend.

    The command line prints the sentence without a traceback and exits with status 2.
    """
