"""`draftloom bench`: how fast, and where the time goes. Every number is measured in the run.

Modules: `prompts` (suites and data sets), `subjects` (what runs), `simulate` (random weights and
acceptance), `measure` (timed runs), `stages` (the instrumented pass), `report` (data and
summary), `table`, `html`, `charts` (output), `compare` (two reports).
"""
