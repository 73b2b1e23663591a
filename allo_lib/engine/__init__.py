"""Models, batches, training, decoding, and the store; knows no study."""
