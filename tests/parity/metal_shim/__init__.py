"""Runs Metal kernel bodies on the CPU; see emulator.py."""
