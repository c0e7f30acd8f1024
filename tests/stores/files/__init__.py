"""Tests of falproxy.stores.files."""
