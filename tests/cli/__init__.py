"""Tests of falproxy.cli: the commands."""
