"""Rules for every implementation of a protocol, and for the source tree as a whole."""
