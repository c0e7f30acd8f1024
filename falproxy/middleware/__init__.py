"""The layers around a call to fal, one middleware a module."""
