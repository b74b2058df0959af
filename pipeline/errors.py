"""What a user did wrong, in one sentence: what, received, remedy."""


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints its message alone and exits with 2."""
