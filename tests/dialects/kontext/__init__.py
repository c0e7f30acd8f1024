"""Tests of falproxy.dialects.kontext."""
