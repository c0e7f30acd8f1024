"""Tests of falproxy.media."""
