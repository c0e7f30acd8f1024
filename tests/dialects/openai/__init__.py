"""Tests of falproxy.dialects.openai."""
