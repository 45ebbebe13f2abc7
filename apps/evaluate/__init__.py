"""`draftloom eval drafter`: how good a drafter is for a target, measured by the real decoder.

Modules: `prompts` (held-out prompts of the user's data), `judge` (what a benchmark's runs say of a
drafter), `output` (tables and page).
"""
