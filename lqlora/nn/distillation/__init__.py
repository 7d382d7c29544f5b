"""Knowledge distillation: low-rank factors and scales of a quantized model are trained to give the outputs of the dense model."""
