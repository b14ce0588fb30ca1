"""The exception for problems that a user can fix."""


class IcmsrError(ValueError):
    """A problem with an input: a value, a picture, a weights file.

    The message is one line that names the value it got, what is allowed and what to do. The command line prints it
    without a traceback and exits with 1; ComfyUI shows it as the node's error.
    """
