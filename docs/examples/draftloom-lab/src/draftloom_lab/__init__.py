"""Components for draftloom, one a module. `plugin` offers them; nothing happens on import."""
