"""The command `refinedet`."""
