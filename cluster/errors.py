"""The errors that a user can meet, and the exit codes that go with them."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75


class BadInputError(ValueError):
    """A mistake in what the user gave: what, got, expected, and what to do. Exit code 2."""


class OutOfReachError(BadInputError):
    """What the user named is elsewhere, and out of reach from here; a plan goes on without it."""


def remote_code_error(model: object) -> BadInputError:
    """What to raise for a model that only code of its own can load."""
    return BadInputError(
        f"{model} comes with code of its own, which is not run: take a model of an architecture "
        "that transformers has, or read that code and set trust_remote_code: true in its section"
    )


class RunError(RuntimeError):
    """A run that cannot go on for a reason outside the configuration. Exit code 1."""


class WorkersLostError(RunError):
    """Training workers, or their nodes, are gone; training can go on with others."""


class EngineNotReadyError(RunError):
    """An engine cannot answer now: it has not reloaded yet, or has died and is being replaced."""
