"""Tests of falproxy.server."""
