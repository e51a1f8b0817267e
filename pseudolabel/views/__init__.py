"""From bytes to model input: one file per modality."""
