"""Tests of falproxy.proxy."""
