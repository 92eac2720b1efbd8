"""The errors that users meet. Each message says what is wrong with its values, the rule, and the fix."""


class MetaloomError(Exception):
    """Base of all errors that are reported as one message, without a traceback."""

    exit_code = 1


class RecipeError(MetaloomError):
    """A recipe that cannot be run; the message lists every problem found."""

    exit_code = 2


class CapabilityError(MetaloomError):
    """A combination that no part of the engine can compute exactly; names one that can."""

    exit_code = 2


class StreamError(MetaloomError):
    """Data that is missing, broken or too small for what the recipe asks."""

    exit_code = 3


class CheckpointError(MetaloomError):
    """A checkpoint that is missing, broken or belongs to another model."""

    exit_code = 4


class LaunchError(MetaloomError):
    """Processes that could not be started, or a run folder that cannot be used."""

    exit_code = 5


class TrackingError(MetaloomError):
    """A tracking store that was named but cannot be used at the start of a run."""

    exit_code = 6
