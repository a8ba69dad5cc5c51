"""Why a conversion was not made: for the person who asked for it. Knows nothing of what was to be converted."""


class CannotConvert(Exception):
    """The message says what is wrong and the way out."""
