"""Training of drafters on the device that runs the model."""
