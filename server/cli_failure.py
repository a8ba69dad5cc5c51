"""What a command raises when it cannot do what was asked. Light, so that the command line starts without torch."""


class CommandFailed(Exception):
    """The message is for the person who typed: it says what is wrong and the way out. Exit status 1."""
