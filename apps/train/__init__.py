"""Training of drafters on the device that runs the model.

`loop` runs it: `data` and `features` feed it, `step` and `mask` are the mathematics, `checkpoint`
keeps it, `evaluate` measures it with the real decoder, `design` and `card` begin and end it.
"""
