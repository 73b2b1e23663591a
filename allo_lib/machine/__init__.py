"""The machine under everything: devices, processes, environment, weights as tensors."""
