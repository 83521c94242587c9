"""Training objectives: the losses of a batch for text, label, ControlNet, DreamBooth, LCM."""
