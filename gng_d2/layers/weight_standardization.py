"""Where whole models that were pickled before version 0.2 look for their convolutions."""

from .ws_conv import WSConv2d  # noqa: F401
