"""Verifiers: how the target checks a draft."""
