"""Tests of falproxy.middleware."""
