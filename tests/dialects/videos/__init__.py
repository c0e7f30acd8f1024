"""Tests of falproxy.dialects.generate."""
