"""The ways a job ends that are not defects of this program, each with one sentence for a person."""


class UserError(ValueError):
    """A mistake that the user can mend: what, received, remedy. Exit status 2, nothing written over."""


class JobError(RuntimeError):
    """The job failed, and trying again did not help. Exit status 1; the logs tell more."""


class StoppedError(RuntimeError):
    """The job was asked to stop, has saved, and goes on with the same command. Exit status 130."""
