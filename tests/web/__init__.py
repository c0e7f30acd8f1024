"""Tests of falproxy.web."""
