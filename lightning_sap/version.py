"""The version of the package, which states that it writes carry too."""

__version__ = "0.2.0"
