"""The demo: compress, fine-tune, save, reload and measure a language model, end to end."""
