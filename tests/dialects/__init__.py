"""Tests of falproxy.dialects."""
