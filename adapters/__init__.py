"""Adapters: how a family of models is loaded, tapped and recorded."""
