"""thinwire: train language models where the network, not the chips, is the bottleneck."""

__version__ = "0.1.0"
