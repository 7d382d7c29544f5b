"""PEQA: fine-tuning of the scales of quantized weights, whose codes stay frozen (arXiv 2305.14152)."""
