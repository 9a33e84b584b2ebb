"""What goes wrong with data sets, apart from programming errors."""


class DataError(ValueError):
    """A data set can't be had or is damaged. The message names the file or argument and what was expected."""
