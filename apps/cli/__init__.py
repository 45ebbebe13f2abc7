"""The command line, `draftloom`."""
