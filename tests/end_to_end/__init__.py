"""Tests with real clients, browsers, processes and servers."""
