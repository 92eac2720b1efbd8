"""metaloom: distributed, large-scale meta-training with exact hypergradients."""

__version__ = "0.1.0"
