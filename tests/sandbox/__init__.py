"""Tests of falproxy.sandbox."""
