"""Tests of falproxy, laid out as the package."""
