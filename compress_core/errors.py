"""What can go wrong in the core, one kind each, every one catchable as its standard kind too."""


class CompressError(Exception):
    """Root of every error the core raises on purpose."""


class ConfigError(CompressError, ValueError):
    """A setting that does not exist or lies outside its range."""


class BudgetError(CompressError, ValueError):
    """A budget that cannot be met by the model it was set for."""


class ModelError(CompressError, ValueError):
    """A folder or an architecture that cannot be compressed, with the reason."""


class TextError(CompressError, ValueError):
    """Calibration or evaluation text that cannot be read or is too short."""


class NumericsError(CompressError, ArithmeticError):
    """A value that is not finite, or a matrix that is not what its name promises."""
