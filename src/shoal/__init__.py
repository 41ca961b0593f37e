"""shoal: many small machines, one big model. The public names, and nothing else."""

__version__ = "0.1.0"

__all__ = ["__version__"]
