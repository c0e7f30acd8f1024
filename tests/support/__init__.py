"""Helpers of the tests: fakes, servers and clients. Fixtures are in the conftest.py files."""
