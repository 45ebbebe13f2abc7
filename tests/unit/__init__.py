"""Unit tests: one part at a time, over fakes and tiny random models."""
