"""Applications: what uses the framework."""
