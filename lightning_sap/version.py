"""The version of the package, which states that it writes carry too."""

__version__ = "0.1.0"
